(() => {
  // Long answers start cut off, all contenders of a prompt together, once they are seen. Without this script they
  // are whole.
  const folded = new WeakSet();
  const fold = (article) => {
    if (folded.has(article)) return;
    folded.add(article);
    const bodies = [...article.querySelectorAll(".body")];
    const button = article.querySelector(".more");
    bodies.forEach((body) => body.classList.add("folded"));
    const short = bodies.map((body) => body.scrollHeight <= body.clientHeight + 8);
    if (short.every(Boolean)) {
      bodies.forEach((body) => body.classList.remove("folded"));
      return;
    }
    bodies.forEach((body, at) => body.classList.toggle("short", short[at]));
    button.hidden = false;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "Fold answers" : "Show whole answers";
      bodies.forEach((body) => body.classList.toggle("folded", !open));
      if (!open) article.scrollIntoView({ block: "start" });
    });
  };
  for (const details of document.querySelectorAll(".case > details")) {
    if (details.open) fold(details.parentElement);
    details.addEventListener("toggle", () => { if (details.open) fold(details.parentElement); });
  }

  // A link to a prompt opens its answers.
  const show = () => {
    const article = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (article?.classList.contains("case")) article.querySelector("details").open = true;
  };
  addEventListener("hashchange", show);
  show();

  // Copying needs a secure context in some browsers; where it is refused the text is selected instead.
  for (const button of document.querySelectorAll(".copy")) {
    const code = button.parentElement.querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // On paper the prompts are as they were left, folded or not; within them reasons are open, and what changed is a
  // control of the screen.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.diff):not(.fold)")];
    closed.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
})();

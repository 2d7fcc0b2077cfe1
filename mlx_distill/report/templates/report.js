"use strict";
(() => {
  const root = document.documentElement;

  // Light or dark: the system's choice until the reader makes one.
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  theme.hidden = false;
  label();

  // Long answers start folded, all contenders of a prompt together. Without this script they are whole.
  for (const article of document.querySelectorAll(".case")) {
    const bodies = [...article.querySelectorAll(".body")];
    const button = article.querySelector(".more");
    bodies.forEach((body) => body.classList.add("folded"));
    if (!bodies.some((body) => body.scrollHeight > body.clientHeight + 8)) {
      bodies.forEach((body) => body.classList.remove("folded"));
      continue;
    }
    bodies.forEach((body) => body.classList.toggle("short", body.scrollHeight <= body.clientHeight + 8));
    button.hidden = false;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "Fold answers" : "Show whole answers";
      bodies.forEach((body) => body.classList.toggle("folded", !open));
      if (!open) article.scrollIntoView({ block: "start" });
    });
  }

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

  // On paper every rationale is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
})();

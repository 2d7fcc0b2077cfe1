(() => {
  const cases = [...document.querySelectorAll(".case")];
  const search = document.getElementById("search");
  const selects = ["field", "change", "tested"].map((name) => [name, document.getElementById(`by-${name}`)])
    .filter(([, select]) => select);
  const count = document.getElementById("count");

  // Search and filters.
  const texts = new Map();
  const textOf = (article) => {
    if (!texts.has(article)) texts.set(article, article.textContent.toLowerCase());
    return texts.get(article);
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const article of cases) {
      const fits = selects.every(([name, select]) => !select.value || article.dataset[name] === select.value)
        && words.every((word) => textOf(article).includes(word));
      article.hidden = !fits;
      shown += fits;
    }
    const narrowed = words.length || selects.some(([, select]) => select.value);
    count.textContent = narrowed ? `${shown} of ${cases.length} prompts` : "";
  };
  search.addEventListener("input", filter);
  selects.forEach(([, select]) => select.addEventListener("change", filter));
  document.querySelector(".tools").hidden = false;
  filter();

  const openAll = document.getElementById("open-all");
  const mark = (open) => {
    openAll.setAttribute("aria-pressed", String(open));
    openAll.textContent = open ? "Close all" : "Open all";
  };
  const folds = cases.map((article) => article.querySelector("details"));
  mark(folds.every((details) => details.open));
  openAll.addEventListener("click", () => {
    const open = openAll.getAttribute("aria-pressed") !== "true";
    folds.forEach((details) => { details.open = open; });
    mark(open);
  });

  // Keys.
  const help = document.getElementById("help");
  const keys = document.getElementById("keys");
  keys.hidden = false;
  keys.addEventListener("click", () => help.showModal());
  document.getElementById("close-help").addEventListener("click", () => help.close());
  let current = null;
  const here = () => document.activeElement?.closest?.(".case") ?? (current?.hidden ? null : current);
  const go = (by) => {
    const visible = cases.filter((article) => !article.hidden);
    if (!visible.length) return;
    const at = visible.indexOf(here());
    current = visible[at < 0 ? (by > 0 ? 0 : visible.length - 1) : Math.min(Math.max(at + by, 0), visible.length - 1)];
    current.querySelector("summary").focus({ preventScroll: true });
    current.scrollIntoView({ block: "start" });
  };
  const difference = () => {
    const article = here() ?? cases.find((one) => !one.hidden);
    const diff = article?.querySelector(".diff");
    if (!diff) return;
    current = article;
    article.querySelector("details").open = true;
    diff.open = !diff.open;
    diff.querySelector("summary").focus();
  };
  const actions = {
    j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1), d: difference,
    "/": () => { search.focus(); search.select(); }, "?": () => help.showModal(),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.defaultPrevented || help.open) return;
    const on = event.target;
    if (on === search && event.key === "Escape") { search.value = ""; filter(); search.blur(); return; }
    if (on.matches?.("input, select, textarea, [contenteditable]")) return;
    // What scrolls sideways has the arrows for itself.
    if (event.key.startsWith("Arrow") && on.matches?.("pre, .scroll, .chart")) return;
    const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
    if (!action) return;
    event.preventDefault();
    action();
  });
})();

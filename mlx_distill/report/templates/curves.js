// The training curves say their values: under the pointer, or step by step with the arrow keys.
(() => {
  for (const chart of document.querySelectorAll(".chart")) {
    const svg = chart.querySelector("svg");
    if (!svg) continue;
    const points = JSON.parse(svg.dataset.points);
    const cursor = svg.querySelector(".cursor");
    const reading = chart.querySelector("output");
    let at = -1;
    const show = (to) => {
      at = Math.min(Math.max(to, 0), points.length - 1);
      const [x, text] = points[at];
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      reading.textContent = text;
    };
    chart.tabIndex = 0;
    chart.setAttribute("role", "group");
    chart.setAttribute("aria-label", "Curve. The arrow keys step through its values.");
    chart.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      let nearest = 0;
      points.forEach(([px], i) => { if (Math.abs(px - x) < Math.abs(points[nearest][0] - x)) nearest = i; });
      if (nearest !== at) show(nearest);
    });
    chart.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: points.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }
})();

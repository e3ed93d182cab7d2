"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // For readers who open the console of their browser.
  window.loralens = { data };

  // Sliders. Every stop was computed by Python: the page shows its texts, and its place on the curve.

  const mark = (slider, name, [x, y]) => {
    const svg = document.querySelector(`#${slider.picture} svg`);
    if (!svg) return;
    // The frame of the axes in the units of the picture, then their limits: written by loralens.reporting.svg.
    const [left, top, width, height, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
    let dot = svg.querySelector(`.marker.${name}`);
    if (!dot) {
      dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      dot.setAttribute("class", `marker ${name}`);
      dot.setAttribute("r", "5.5");
      svg.append(dot);
    }
    dot.setAttribute("cx", left + (width * (x - x0)) / (x1 - x0));
    dot.setAttribute("cy", top + height * (1 - (y - y0) / (y1 - y0)));
  };

  all(".slider").forEach((panel, i) => {
    const slider = data.sliders[i], input = panel.querySelector("input");
    const show = () => {
      const stop = slider.stops[+input.value];
      panel.querySelector(".value").textContent = stop.value;
      for (const name of ["rank", "budget"]) {
        for (const key of ["error", "kept", "bytes", "now", "ranks"]) {
          panel.querySelector(`.${name} .${key}`).textContent = stop[name][key];
        }
        panel.querySelector(`.${name} code`).textContent = `${slider.command} ${stop[name].option}`;
        mark(slider, name, stop[name].at);
      }
      input.setAttribute("aria-valuetext", `rank ${stop.value}`);
    };
    input.max = slider.stops.length - 1;
    input.value = slider.start;
    input.addEventListener("input", show);
    show();
    panel.hidden = false;  // without this script the slider would show nothing, so the page hides it
  });

  // Tables sort by the numbers behind their text.

  const key = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.s;
    return number === undefined ? cell.textContent : number === "" ? NaN : +number;
  };
  const compare = (a, b) => {
    if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), "en", { numeric: true });
    return a - b;
  };
  const empty = (x) => x === "" || (typeof x === "number" && Number.isNaN(x));
  for (const head of all("th button")) {
    head.addEventListener("click", () => {
      const th = head.parentElement, table = th.closest("table"), column = th.cellIndex;
      // The first click puts names in alphabetical order, and the largest numbers on top.
      const first = th.classList.contains("words") ? 1 : -1;
      const before = th.getAttribute("aria-sort");
      const sign = before ? (before === "ascending" ? -1 : 1) : first;
      all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      // Rows without a number stay at the end in both orders.
      rows.sort(([a], [b]) => (empty(a) || empty(b) ? empty(a) - empty(b) : sign * compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }

  // The filter of modules: parts of names, with * for anything.

  const filter = document.getElementById("filter"), status = document.getElementById("filtered");
  const rows = all("td.module").map((cell) => [cell.parentElement, cell.textContent.toLowerCase()]);
  const names = new Set(all("#modules td.module").map((cell) => cell.textContent.toLowerCase()));
  const drawn = all("svg [data-n], svg[data-n]").map((element) => [element, element.dataset.n.toLowerCase()]);
  filter.hidden = !names.size;  // a page without modules has nothing to filter
  filter.addEventListener("input", () => {
    const words = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const patterns = words.map((word) => new RegExp(word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*")));
    const hides = (name) => patterns.length > 0 && !patterns.some((pattern) => pattern.test(name));
    rows.forEach(([row, name]) => { row.hidden = hides(name); });
    // Lines and cells turn pale, as a chart with gaps would be read as one with missing modules. What stands for several
    // modules or for none stays.
    drawn.forEach(([element, name]) => element.classList.toggle("off", names.has(name) && hides(name)));
    status.textContent = patterns.length ? `${[...names].filter((name) => !hides(name)).length} of ${names.size} modules` : "";
  });

  // Hovering shows values.

  const tip = document.getElementById("tip");
  const points = new WeakMap();
  const lines = (svg) => {
    // Paths are read once for each chart, when it is first pointed at: a page may have thousands of lines.
    if (!points.has(svg)) {
      points.set(svg, all("g[data-y]", svg).map((line) => {
        const places = line.querySelector("path").getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number));
        const y = line.dataset.y.split(" ");
        return { line, places, y, x: line.dataset.x ? line.dataset.x.split(" ") : y.map((_, i) => `${i + 1}`) };
      }));
    }
    return points.get(svg);
  };
  const inside = (element, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(element.getScreenCTM().inverse());
  const nearest = (svg, event) => {
    const at = inside(svg, event);
    let best = null, least = 24 * 24;  // points farther away than 24 pixels are not meant
    for (const curve of lines(svg)) {
      if (curve.line.classList.contains("off")) continue;
      curve.places.forEach(([x, y], i) => {
        const distance = (x - at.x) ** 2 + (y - at.y) ** 2;
        if (distance < least) { least = distance; best = [curve, i]; }
      });
    }
    all(".near", svg).forEach((line) => line.classList.remove("near"));
    if (!best) return "";
    const [curve, i] = best;
    curve.line.classList.add("near");
    return `${curve.line.dataset.n}\n${svg.dataset.hover} ${curve.x[i]}: ${curve.y[i]}`;
  };
  // A map of φ has its numbers in one attribute, two digits each, as an element for every cell would make the page large.
  const overlap = (group, event) => {
    const at = inside(group, event), rows = group.dataset.phi.split(" ");
    const i = Math.floor(at.y), j = Math.floor(at.x);
    const value = rows[i] && rows[i].slice(2 * j, 2 * j + 2);
    return value ? `φ(${i + 1}, ${j + 1}) ${value === "99" ? "≥" : "="} 0.${value}` : "";
  };
  const hover = (event) => {
    const target = event.target instanceof Element ? event.target : null;
    let text = "";
    if (target) {
      const cell = target.closest("[data-t]"), phi = target.closest("[data-phi]"), svg = target.closest("svg.lines");
      text = cell ? `${cell.dataset.n}: ${cell.dataset.t}` : phi ? overlap(phi, event) : svg ? nearest(svg, event) : "";
    }
    tip.textContent = text;
    tip.hidden = !text;
    if (!text) return;
    // Beside the pointer, and moved so that it stays within the window.
    const width = document.documentElement.clientWidth;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, width - box.width - 6))}px`;
    const above = event.clientY + box.height + 24 > window.innerHeight;
    tip.style.top = `${above ? event.clientY - box.height - 12 : event.clientY + 16}px`;
  };
  document.addEventListener("pointermove", hover);
  document.addEventListener("pointerdown", hover);  // a touch does not move
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Light and dark, and a page on paper.

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  // Paper cannot be clicked, so everything is unfolded while the page is printed.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));
})();

"use strict";
(() => {
  const carried = JSON.parse(document.getElementById("carried").textContent);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  window.loralens = { carried };

  // Sliders.

  // Every stop was computed by Python: the page shows its texts, and its place on the curve.

  const mark = (adapter, name, [x, y]) => {
    const svg = document.querySelector(`#${adapter.picture} svg`);
    if (!svg) return;
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

  for (const panel of all(".slider")) {
    const adapter = carried.adapters[+panel.dataset.adapter];
    for (const name of ["budget", "rank"]) {
      const { stops, start } = adapter[name];
      const input = panel.querySelector(`input.${name}`);
      const show = () => {
        const stop = stops[+input.value];
        for (const key of ["value", "error", "kept", "bytes", "now", "ranks"]) {
          panel.querySelector(`.${name} .${key}`).textContent = stop[key];
        }
        input.setAttribute("aria-valuetext", stop.value);
        panel.querySelector("code").textContent = `${adapter.command} ${stop.option}`;
        mark(adapter, name, stop.at);
      };
      input.max = stops.length - 1;
      input.value = start;
      input.addEventListener("input", show);
      show();
    }
    panel.hidden = false;
  }

  // Tables sort by the numbers behind their text.

  const key = (row, column) => {
    const cell = row.cells[column];
    const known = cell.dataset.s;
    return known === undefined ? cell.textContent : known === "" ? NaN : +known;
  };
  const compare = (a, b) => {
    if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), "en", { numeric: true });
    return a - b;
  };
  const empty = (x) => x === "" || (typeof x === "number" && Number.isNaN(x));
  for (const head of all("th button")) {
    head.addEventListener("click", () => {
      const th = head.parentElement, table = th.closest("table"), column = th.cellIndex;
      const first = th.classList.contains("words") ? 1 : -1;
      const was = th.getAttribute("aria-sort");
      const way = was ? (was === "ascending" ? -1 : 1) : first;
      all("th", table).forEach((one) => one.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => (empty(a) || empty(b) ? empty(a) - empty(b) : way * compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }

  // The filter of modules: parts of names, with * for anything.

  const filter = document.getElementById("filter"), said = document.getElementById("filtered");
  const tagged = all("[data-m]").map((one) => [one, one.dataset.m.split(" ").map(Number)]);
  const choose = () => {
    const words = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const rules = words.map((word) => new RegExp(word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*")));
    const hits = carried.modules.map((name) => !rules.length || rules.some((rule) => rule.test(name.toLowerCase())));
    for (const [one, modules] of tagged) {
      const off = !modules.some((m) => hits[m]);
      if (one instanceof HTMLElement) one.hidden = off; else one.classList.toggle("off", off);
    }
    const count = hits.filter(Boolean).length;
    said.textContent = rules.length ? `${count} of ${hits.length} modules` : "";
    document.body.classList.toggle("filtered", rules.length > 0);
  };
  filter.addEventListener("input", choose);

  // Hovering shows values.

  const tip = document.getElementById("tip");
  const points = new WeakMap();
  const lines = (svg) => {
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
    let best = null, least = 24 * 24;
    for (const one of lines(svg)) {
      if (one.line.classList.contains("off")) continue;
      one.places.forEach(([x, y], i) => {
        const away = (x - at.x) ** 2 + (y - at.y) ** 2;
        if (away < least) { least = away; best = [one, i]; }
      });
    }
    all(".near", svg).forEach((line) => line.classList.remove("near"));
    if (!best) return "";
    const [one, i] = best;
    one.line.classList.add("near");
    const label = svg.dataset.hover;
    return `${one.line.dataset.n}\n${label} ${one.x[i]}: ${one.y[i]}`;
  };
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
      const told = target.closest("[data-t]"), phi = target.closest("[data-phi]"), svg = target.closest("svg.lines");
      text = told ? told.dataset.t : phi ? overlap(phi, event) : svg ? nearest(svg, event) : "";
    }
    tip.textContent = text;
    tip.hidden = !text;
    if (!text) return;
    const room = document.documentElement.clientWidth;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, room - box.width - 6))}px`;
    const above = event.clientY + box.height + 24 > window.innerHeight;
    tip.style.top = `${above ? event.clientY - box.height - 12 : event.clientY + 16}px`;
  };
  document.addEventListener("pointermove", hover);
  document.addEventListener("pointerdown", hover);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Light and dark, and a page on paper.

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((one) => { one.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
})();

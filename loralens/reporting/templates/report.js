"use strict";
(() => {
  const carried = JSON.parse(document.getElementById("carried").textContent);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // The choice of ranks, as `loralens compress` makes it: directions by what they save for each byte.

  const items = (adapter) => {
    const values = adapter.items.flatMap((item) => item.s);
    const top = Math.max(0, ...values.map((s) => (s.length ? s[0] : 0))) || 1;
    return adapter.items.map((item) => {
      const widest = Math.max(0, ...item.s.map((s) => s.length));
      const gains = new Float64Array(widest);
      for (const s of item.s) s.forEach((x, i) => { gains[i] += (x / top) * (x / top); });
      return { gains, cost: item.bytes, least: 1, most: Math.max(1, adapter.one_rank ? item.width : widest), there: widest };
    });
  };
  const clip = (item, rank) => Math.min(Math.max(rank, item.least), item.most);
  const costOf = (its, chosen) => its.reduce((sum, item, i) => sum + item.cost * chosen[i], 0);
  const gainOf = (its, chosen) => {
    let sum = 0;
    its.forEach((item, i) => { for (let k = 0; k < Math.min(chosen[i], item.gains.length); k++) sum += item.gains[k]; });
    return sum;
  };
  const uniform = (its, rank) => its.map((item) => clip(item, rank));

  const filled = (its, start, capacity) => {
    const chosen = [...start];
    let left = capacity - costOf(its, chosen);
    const open = [];
    its.forEach((item, i) => {
      for (let k = chosen[i]; k < Math.min(item.most, item.gains.length); k++) open.push([item.gains[k] / item.cost, i]);
    });
    open.sort((a, b) => b[0] - a[0]);
    const ended = new Set();
    for (const [worth, i] of open) {
      if (worth <= 0) break;
      if (ended.has(i) || its[i].cost > left) { ended.add(i); continue; }
      chosen[i] += 1;
      left -= its[i].cost;
    }
    return chosen;
  };

  const allocate = (its, capacity) => {
    const candidates = [filled(its, uniform(its, 0), capacity)];
    for (let rank = Math.max(0, ...its.map((item) => item.most)); rank > 0; rank--) {
      const chosen = uniform(its, rank);
      if (costOf(its, chosen) <= capacity) { candidates.push(filled(its, chosen, capacity)); break; }
    }
    return candidates.reduce((best, one) => (gainOf(its, one) > gainOf(its, best) ? one : best));
  };

  const toppedUp = (its, start, budget, size) => {
    let chosen = start;
    let left = budget - size(chosen);
    const ended = new Set();
    for (;;) {
      let best = -1;
      its.forEach((item, i) => {
        const next = chosen[i];
        if (ended.has(i) || next >= Math.min(item.most, item.gains.length) || item.cost > left || !(item.gains[next] > 0)) return;
        if (best < 0 || item.gains[next] / item.cost > its[best].gains[chosen[best]] / its[best].cost) best = i;
      });
      if (best < 0) return chosen;
      const more = chosen.map((rank, i) => rank + (i === best ? 1 : 0));
      if (size(more) <= budget) { chosen = more; left = budget - size(more); } else ended.add(best);
    }
  };

  const within = (its, budget, size, oneRank) => {
    const least = uniform(its, 0);
    const needed = size(least);
    const top = Math.max(0, ...its.map((item) => item.most));
    if (oneRank) {
      let low = 0, high = top;
      while (low < high) {
        const middle = Math.floor((low + high + 1) / 2);
        if (size(uniform(its, middle)) <= budget) low = middle; else high = middle - 1;
      }
      return uniform(its, low);
    }
    const most = uniform(its, top);
    if (size(most) <= budget) return most;
    let chosen = least;
    let capacity = budget - needed + costOf(its, least);
    while (capacity > costOf(its, least)) {
      const trial = allocate(its, capacity);
      const excess = size(trial) - budget;
      if (excess <= 0) { chosen = trial; break; }
      capacity -= excess;
    }
    return toppedUp(its, chosen, budget, size);
  };

  // Bytes of the file: a header whose length hangs on the digits in it, and the numbers.
  const sizeOf = (adapter) => (chosen) => {
    const file = adapter.file;
    if (!file.tensors) return file.beside + adapter.items.reduce((sum, item, i) => sum + item.bytes * chosen[i], 0);
    let length = file.head, begin = 0;
    for (const [entry, unit, item] of file.tensors) {
      const rank = item < 0 ? 1 : chosen[item];
      const end = begin + unit * rank;
      length += entry + `${begin}${end}`.length + (item < 0 ? 0 : `${rank}`.length);
      begin = end;
    }
    return 8 + length + ((8 - (length % 8)) % 8) + begin;
  };

  const errorOf = (adapter) => {
    const values = adapter.items.flatMap((item, i) => item.s.map((s) => [s, i]));
    const top = Math.max(0, ...values.map(([s]) => (s.length ? s[0] : 0))) || 1;
    let whole = 0;
    for (const [s] of values) for (const x of s) whole += (x / top) ** 2;
    return (chosen) => {
      let lost = 0;
      for (const [s, i] of values) for (let k = s.length - 1; k >= chosen[i]; k--) lost += (s[k] / top) ** 2;
      return whole ? Math.sqrt(lost / whole) : 0;
    };
  };

  const models = carried.adapters.map((adapter) => {
    const its = items(adapter), size = sizeOf(adapter), error = errorOf(adapter);
    const say = (chosen) => ({ ranks: chosen, bytes: size(chosen), error: error(chosen) });
    return {
      least: size(uniform(its, 0)),
      most: size(uniform(its, Math.max(0, ...its.map((item) => item.most)))),
      atRank: (rank) => say(adapter.one_rank ? uniform(its, rank) : its.map((item) => clip(item, Math.min(rank, item.there)))),
      atBudget: (budget) => say(within(its, budget, size, adapter.one_rank)),
    };
  });
  window.loralens = { carried, models };

  // Numbers in words.

  const bytes = (count) => {
    let value = count, unit = "B";
    for (const bigger of ["kB", "MB", "GB"]) {
      if (value < 1000) break;
      value /= 1000; unit = bigger;
    }
    return unit === "B" ? `${value}\u00a0B` : `${value < 100 ? +value.toPrecision(3) : Math.round(value)}\u00a0${unit}`;
  };
  const percent = (share) => `${(100 * share).toFixed(2)}\u00a0%`;
  const span = (ranks) => {
    const low = Math.min(...ranks), high = Math.max(...ranks);
    return low === high ? `rank ${low}` : `ranks ${low}–${high}`;
  };

  // Sliders.

  const mark = (adapter, name, told) => {
    const svg = document.querySelector(`#${adapter.picture} svg`);
    if (!svg || !svg.dataset.frame) return;
    const [left, top, width, height, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
    let dot = svg.querySelector(`.marker.${name}`);
    if (!dot) {
      dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      dot.setAttribute("class", `marker ${name}`);
      dot.setAttribute("r", "5.5");
      svg.append(dot);
    }
    dot.setAttribute("cx", left + (width * (told.bytes / 1e6 - x0)) / (x1 - x0));
    dot.setAttribute("cy", top + height * (1 - (100 * told.error - y0) / (y1 - y0)));
  };

  for (const panel of all(".slider")) {
    const adapter = carried.adapters[+panel.dataset.adapter], model = models[+panel.dataset.adapter];
    const [rank, budget] = ["rank", "budget"].map((name) => panel.querySelector(`input.${name}`));
    const put = (name, key, text) => { panel.querySelector(`.${name} .${key}`).textContent = text; };
    const show = (name, told) => {
      const about = adapter.file.tensors ? "" : "about ", chosen = name === "budget" ? about : "";
      put(name, "error", chosen + percent(told.error));
      put(name, "kept", chosen + percent(1 - told.error ** 2));
      put(name, "bytes", about + bytes(told.bytes));
      put(name, "now", percent(told.bytes / model.most));
      put(name, "ranks", span(told.ranks));
      mark(adapter, name, told);
    };
    const command = (text) => { panel.querySelector("code").textContent = `${adapter.command} ${text}`; };
    const byRank = () => {
      show("rank", model.atRank(+rank.value));
      put("rank", "value", rank.value);
      command(`--rank ${rank.value}`);
    };
    const byBudget = () => {
      show("budget", model.atBudget(+budget.value));
      put("budget", "value", bytes(+budget.value));
      command(`--size ${budget.value}`);
    };
    rank.max = adapter.most;
    rank.value = adapter.start;
    budget.min = model.least;
    budget.max = model.most;
    budget.value = model.atRank(adapter.start).bytes;
    let due = 0;
    rank.addEventListener("input", byRank);
    budget.addEventListener("input", () => {
      cancelAnimationFrame(due);
      due = requestAnimationFrame(byBudget);
    });
    byBudget();
    byRank();
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

"use strict";
(() => {
  const cards = [...document.querySelectorAll(".card")].map((card) => [card, card.textContent.toLowerCase()]);
  const [search, family, level, status, none] = ["search", "family", "level", "filtered", "none"].map((id) => document.getElementById(id));
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [card, text] of cards) {
      const fits = words.every((word) => text.includes(word)) && (!family.value || card.dataset.family === family.value) && (!level.value || card.dataset.level === level.value);
      card.hidden = !fits;
      shown += fits;
    }
    status.textContent = shown < cards.length ? `${shown} of ${cards.length}` : "";
    none.hidden = shown > 0;
  };
  for (const input of [search, family, level]) input.addEventListener("input", show);
  // Browsers keep what was typed when a page is loaded again.
  show();
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();

// Light, dark, or as the system has it. Runs before the first paint, so that nothing flashes.
"use strict";
(() => {
  const kept = (() => {
    try {
      return localStorage.getItem("jaxserve.theme");
    } catch {
      return null; // storage is forbidden: the choice lasts as long as the page
    }
  })();
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();

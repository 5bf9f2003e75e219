// Not a module, and in the head: a chosen theme must be set before the first paint, or the page flashes in the other.
(() => {
  try {
    const chosen = localStorage.getItem("xgen.theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage may be forbidden by the browser's settings; the system's own theme is then used.
  }
})();

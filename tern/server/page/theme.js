// Sets light or dark before the first paint. Not a module, because modules run too late for that.
(() => {
  try {
    const theme = JSON.parse(localStorage.getItem("tern.preferences") ?? "{}").theme;
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is closed or holds something else: the system's theme it is.
  }
})();

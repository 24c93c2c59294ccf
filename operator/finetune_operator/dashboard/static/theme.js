// Light or dark: what the user chose here, otherwise what the system says. Loaded before anything is painted.
"use strict";

const THEME_KEY = "finetune-theme";

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

{
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem(THEME_KEY);
  setTheme(chosen() ?? (system.matches ? "dark" : "light"));
  system.addEventListener("change", () => chosen() ?? setTheme(system.matches ? "dark" : "light"));
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      localStorage.setItem(THEME_KEY, next);
      setTheme(next);
    });
  });
}

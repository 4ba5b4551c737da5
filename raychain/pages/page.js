(function () {
  "use strict";
  var root = document.documentElement, button = document.getElementById("theme"), key = "raychain-theme";
  function dark() {
    var chosen = root.getAttribute("data-theme");
    return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
  try {
    var kept = localStorage.getItem(key);
    if (kept === "dark" || kept === "light") { root.setAttribute("data-theme", kept); }
  } catch (error) { /* no storage for this page: the theme is chosen anew each time */ }
  button.hidden = false;
  button.addEventListener("click", function () {
    var theme = dark() ? "light" : "dark";
    root.setAttribute("data-theme", theme);
    try { localStorage.setItem(key, theme); } catch (error) { /* as above */ }
  });
  document.querySelectorAll("table.sortable th").forEach(function (head, column) {
    var down = true;
    head.addEventListener("click", function () {
      var body = head.closest("table").tBodies[0], rows = Array.from(body.rows);
      var scale = { K: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18, Z: 1e21, Y: 1e24 };
      function value(row) {
        var text = row.cells[column].textContent, found = /^([-\d.,]+)\s*([KMGTPEZY]?)/.exec(text);
        return found ? parseFloat(found[1].replace(/,/g, "")) * (scale[found[2]] || 1) : text;
      }
      rows.sort(function (a, b) {
        var x = value(a), y = value(b);
        var order = typeof x === "number" ? (typeof y === "number" ? x - y : 1) : typeof y === "number" ? -1 : x.localeCompare(y);
        return down ? -order : order;
      });
      down = !down;
      rows.forEach(function (row) { body.appendChild(row); });
    });
  });
})();

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
  var tip = document.getElementById("tip");
  function tell(word) {
    var meaning = document.getElementById(word.getAttribute("aria-describedby"));
    if (!meaning) { return; }
    tip.textContent = meaning.textContent;
    tip.hidden = false;
    var box = word.getBoundingClientRect(), own = tip.getBoundingClientRect(), room = document.documentElement.clientWidth;
    tip.style.left = Math.max(8, Math.min(box.left, room - own.width - 8)) + "px";
    var below = box.bottom + 6;
    tip.style.top = (below + own.height > window.innerHeight ? Math.max(8, box.top - own.height - 6) : below) + "px";
  }
  function over(event) {
    var word = event.target.closest ? event.target.closest("button.term") : null;
    if (word) { tell(word); } else if (event.target !== tip) { tip.hidden = true; }
  }
  document.addEventListener("mouseover", over);
  document.addEventListener("focusin", over);
  document.addEventListener("click", over);
  document.addEventListener("focusout", function () { tip.hidden = true; });
  window.addEventListener("scroll", function () { tip.hidden = true; }, { passive: true });
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") { tip.hidden = true; } });
  var scale = { K: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18, Z: 1e21, Y: 1e24 };
  function sort(table, column, down) {
    var body = table.tBodies[0], rows = Array.from(body.rows);
    function value(row) {
      var text = row.cells[column].textContent, found = /^([-\d.,]+)\s*([KMGTPEZY]?)/.exec(text);
      return found ? parseFloat(found[1].replace(/,/g, "")) * (scale[found[2]] || 1) : text;
    }
    rows.sort(function (a, b) {
      var x = value(a), y = value(b);
      var order = typeof x === "number" ? (typeof y === "number" ? x - y : 1) : typeof y === "number" ? -1 : x.localeCompare(y);
      return down ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
    Array.from(table.tHead.rows[0].cells).forEach(function (head, place) {
      if (place === column) { head.setAttribute("aria-sort", down ? "descending" : "ascending"); }
      else { head.removeAttribute("aria-sort"); }
    });
  }
  document.addEventListener("click", function (event) {
    var button = event.target.closest ? event.target.closest("button.sort") : null;
    if (!button) { return; }
    var head = button.closest("th");
    sort(button.closest("table"), head.cellIndex, head.getAttribute("aria-sort") !== "descending");
  });
  root.raychainSort = sort;
})();

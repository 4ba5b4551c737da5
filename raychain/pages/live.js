(function () {
  "use strict";
  var every = 2000, failed = 0, last = "";
  function synced(from, to) {
    Array.from(to.attributes).forEach(function (own) {
      if (from.getAttribute(own.name) !== own.value) { from.setAttribute(own.name, own.value); }
    });
    Array.from(from.attributes).forEach(function (own) {
      if (["open", "aria-sort"].includes(own.name)) { return; }
      if (!to.hasAttribute(own.name)) { from.removeAttribute(own.name); }
    });
  }
  function morph(from, to) {
    if (from.isEqualNode(to)) { return; }
    if (from.nodeType !== 1 || to.nodeType !== 1 || from.nodeName !== to.nodeName || from.nodeName === "svg") {
      from.replaceWith(document.importNode(to, true));
      return;
    }
    synced(from, to);
    var ours = Array.from(from.childNodes), theirs = Array.from(to.childNodes);
    theirs.forEach(function (node, place) {
      if (ours.length > place) { morph(ours[place], node); } else { from.appendChild(document.importNode(node, true)); }
    });
    ours.slice(theirs.length).forEach(function (node) { node.remove(); });
  }
  function sections(main) {
    var found = {};
    Array.from(main.querySelectorAll(":scope > section")).forEach(function (section) {
      var head = section.querySelector("h2");
      if (head) { found[head.textContent] = section; }
    });
    return found;
  }
  function update(text) {
    if (text === last) { return; }
    last = text;
    var fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    var main = document.querySelector("main"), sorted = [];
    document.querySelectorAll("th[aria-sort]").forEach(function (head) {
      sorted.push([head.closest("section"), head.cellIndex, head.getAttribute("aria-sort") === "descending"]);
    });
    var ours = sections(main);
    Array.from(fresh.children).forEach(function (node, place) {
      var head = node.nodeName === "SECTION" ? node.querySelector("h2") : null;
      var mine = head ? ours[head.textContent] : null, there = main.children[place];
      if (mine ? mine !== there : false) { main.insertBefore(mine, there || null); there = mine; }
      if (head ? !mine : false) { main.insertBefore(document.importNode(node, true), there || null); }
      else if (there) { morph(there, node); }
      else { main.appendChild(document.importNode(node, true)); }
    });
    while (main.children.length > fresh.children.length) { main.lastElementChild.remove(); }
    sorted.forEach(function (one) {
      var table = one[0] ? one[0].querySelector("table.sortable") : null;
      if (table) { document.documentElement.raychainSort(table, one[1], one[2]); }
    });
  }
  function ended() { return document.getElementById("live").hasAttribute("data-ended"); }
  function look() {
    fetch(location.pathname, { cache: "no-cache" }).then(function (answer) {
      if (!answer.ok) { throw new Error(String(answer.status)); }
      return answer.text();
    }).then(function (text) {
      failed = 0;
      update(text);
      if (!ended()) { setTimeout(look, every); }
    }).catch(function () {
      failed += 1;
      if (failed === 3) { document.getElementById("live").textContent = "Nothing answers any more: raychain report --follow has ended."; }
      setTimeout(look, every * Math.min(failed, 15));
    });
  }
  if (!ended()) { setTimeout(look, every); }
})();

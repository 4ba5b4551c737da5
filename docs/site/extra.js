// Tables that scroll sideways can be reached, and so scrolled, by keyboard.
addEventListener("load", () => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    Object.assign(table, { tabIndex: 0, role: "region", ariaLabel: "Table" });
  }
});

"use strict";
for (const map of document.querySelectorAll(".map svg")) {
  const said = map.closest("section").querySelector("output");
  const names = map.closest(".map").querySelectorAll("li");
  const show = (event) => {
    const cell = event.target.closest("rect");
    if (cell) said.textContent = names[cell.y.baseVal.value / 20].textContent + ", " + cell.textContent;
  };
  map.addEventListener("pointerover", show);
  map.addEventListener("click", show);
}
for (const table of document.querySelectorAll("table")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[head.cellIndex].dataset.v ?? "";
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (x - y);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}

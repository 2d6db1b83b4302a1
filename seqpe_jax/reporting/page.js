// What a reader may do with the page: sort a table by any column, and pick the curves of the plots. Without it, all is there.
"use strict";

function valueOf(body, column) {
  const cell = body.rows[0].cells[column], number = cell.querySelector("data");
  if (cell.classList.contains("missing")) return null;
  return number ? Number(number.value) : cell.textContent.trim();
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, heads, column) {
  const falls = heads[column].getAttribute("aria-sort") === "ascending", sign = falls ? -1 : 1;
  const known = (value) => value !== null && !Number.isNaN(value); // what is missing, or no number, comes last either way
  const bodies = [...table.tBodies].map((body) => ({ body, value: valueOf(body, column) }));
  bodies.sort((a, b) => known(b.value) - known(a.value) || (known(a.value) ? sign * compare(a.value, b.value) : 0));
  for (const { body } of bodies) table.append(body);
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", falls ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table")) {
  const bodies = [...table.tBodies], heads = [...table.tHead.rows[0].cells];
  if (bodies.length < 2 || bodies.some((body) => body.rows.length > 1)) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, heads, column));
    head.append(button);
  });
}

const pick = document.getElementById("pick");
if (pick) {
  const boxes = [...pick.querySelectorAll("input")];
  const show = () => {
    for (const box of boxes)
      for (const part of document.querySelectorAll(`svg [data-row="${box.value}"]`))
        part.style.display = box.checked ? "" : "none";
  };
  for (const box of boxes) box.addEventListener("change", show);
  for (const button of pick.querySelectorAll("button"))
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = button.value === "all";
      show();
    });
  pick.hidden = false;
  show(); // a browser that goes back keeps what was ticked
}

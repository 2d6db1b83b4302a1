// Sorts a table by the column whose heading is clicked; missing values and NaN come last in either direction.
"use strict";

function valueOf(body, column) {
  const cell = body.rows[0].cells[column], number = cell.querySelector("data");
  if (cell.classList.contains("missing")) return null;
  return number ? Number(number.value) : cell.textContent.trim();
}

function sortBy(table, heads, column) {
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const known = (value) => value !== null && !Number.isNaN(value);
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  const bodies = [...table.tBodies].map((body) => ({ body, value: valueOf(body, column) }));
  bodies.sort((a, b) => known(b.value) - known(a.value) || (known(a.value) ? sign * compare(a.value, b.value) : 0));
  for (const { body } of bodies) table.append(body);
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  const bodies = [...table.tBodies], heads = [...table.tHead.rows[0].cells];
  if (bodies.length < 2 || bodies.some((body) => body.rows.length > 1)) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, heads, column));
    head.append(button);
  });
}

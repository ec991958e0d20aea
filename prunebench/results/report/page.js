"use strict";

// Tables: a click on a heading sorts by it, a second one turns the order. Empty cells stay last.
function sortBy(button) {
  const heading = button.closest("th"), table = button.closest("table");
  const column = heading.cellIndex, body = table.tBodies[0];
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.key }));
  const numeric = keyed.every(({ key }) => key === "" || !Number.isNaN(Number(key)));
  const order = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
  keyed.sort((a, b) =>
    (a.key === "") - (b.key === "") || (a.key === "" ? 0 : order(a.key, b.key) * (ascending ? 1 : -1)));
  body.append(...keyed.map(({ row }) => row));
  for (const other of heading.parentNode.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const said = table.closest("section").querySelector("[aria-live]");
  said.textContent = `Sorted by ${button.textContent}, ${ascending ? "ascending" : "descending"}`;
}

// Heat maps: the shapes stay, another run brings colors and texts.
function showRun(section, data, number) {
  const run = data.runs[number];
  for (const figure of section.querySelectorAll("figure[data-kind]")) {
    const values = run[figure.dataset.kind];
    figure.hidden = !values;
    if (!values) continue;
    for (const box of figure.querySelectorAll("rect[data-key]")) {
      const key = Number(box.dataset.key), color = values.colors[key];
      const module = data.modules[Math.floor(key / data.blocks.length)];
      box.setAttribute("fill", color === null ? "var(--grid)" : data.palette[color]);
      box.querySelector("title").textContent =
        `${module}, block ${data.blocks[key % data.blocks.length]}: ${values.texts[key]}`;
    }
    for (const text of figure.querySelectorAll("text[data-key]")) text.textContent = values[text.dataset.key];
    for (const cell of figure.querySelectorAll("td[data-key]")) cell.textContent = values.texts[cell.dataset.key];
  }
}

for (const section of document.querySelectorAll(".heat")) {
  const data = JSON.parse(section.querySelector(".runs").textContent);
  const select = section.querySelector("select");
  select.addEventListener("change", () => showRun(section, data, Number(select.value)));
  showRun(section, data, Number(select.value)); // a browser may have kept another choice
}

// Copying: by the clipboard where the browser allows it, else by selecting for the reader.
function select(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  const selection = window.getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

async function copy(button) {
  const code = button.parentNode.querySelector("code"), label = button.firstChild;
  let copied = false;
  try {
    await navigator.clipboard.writeText(code.textContent);
    copied = true;
  } catch { // no clipboard here, or not allowed
    select(code);
    copied = document.execCommand("copy");
  }
  if (!copied) select(code);
  label.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
  document.getElementById("copied").textContent = label.textContent;
  setTimeout(() => { label.textContent = "Copy"; }, 3000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.classList.contains("copy")) copy(button);
  else if (button?.closest("table.sortable")) sortBy(button);
});

// A link to a provenance opens it.
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target?.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
}
window.addEventListener("hashchange", openTarget);
openTarget();

"use strict";
// Filters for the flagged rows: by code, severity, split and text. Without it all rows are shown.

const rows = [...document.querySelectorAll(".row")].map((element) => ({
  element,
  codes: JSON.parse(element.dataset.codes),
  severities: JSON.parse(element.dataset.severities),
  split: [element.dataset.split],
  text: element.textContent.toLowerCase(),
}));
const filters = document.querySelector(".filters");

function apply() {
  const selects = [...filters.querySelectorAll("select")].filter((select) => select.value);
  const words = filters.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const fits =
      selects.every((select) => row[select.dataset.filter].includes(select.value)) &&
      words.every((word) => row.text.includes(word));
    row.element.hidden = !fits;
    shown += fits;
  }
  filters.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
}

function showCode(code) {
  for (const select of filters.querySelectorAll("select")) select.value = select.dataset.filter === "codes" ? code : "";
  filters.querySelector("input").value = "";
  apply();
  document.querySelector("#rows").scrollIntoView();
}

if (filters) {
  filters.hidden = false;
  filters.addEventListener("input", apply);
  for (const button of document.querySelectorAll("button.show")) {
    button.hidden = false;
    button.addEventListener("click", () => showCode(button.dataset.code));
  }
  apply();
}

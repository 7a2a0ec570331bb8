// A click on a heading sorts by its column: the largest first, then the smallest. NaN come last.
for (const head of document.querySelectorAll("[data-sort]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const value = (row) => {
      const text = row.cells[head.cellIndex].dataset.value;
      return text.endsWith("inf") ? (text.startsWith("-") ? -Infinity : Infinity) : Number(text);
    };
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => (isNaN(a) - isNaN(b)) || (a === b ? 0 : (a < b) === down ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
  });
}

"use strict";
// The page's own program: it unpacks plotly.js, draws the figures in the reader's colour scheme, and sorts tables.
(() => {
  const PRINT_WIDTH_PX = 660; // A4 less its margins
  // Named one by one: among plotly's own there is a button that sends the figure to its makers' service.
  const BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"];
  const NARROW_PX = 640; // where the buttons would lie over the legend
  const dark = matchMedia("(prefers-color-scheme: dark)");

  async function unpack(packed) {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack plotly.js");
    const stream = new DecompressionStream("deflate");
    const writer = stream.writable.getWriter();
    writer.write(Uint8Array.from(atob(packed), (character) => character.charCodeAt(0)));
    writer.close();
    return new Response(stream.readable).text();
  }

  function run(source) {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
  }

  function readJson(element) {
    return JSON.parse(element.textContent);
  }

  function figures() {
    return Array.from(document.querySelectorAll("figure.chart"), (figure) => ({
      plot: figure.querySelector(".plot"),
      content: readJson(figure.querySelector("script.figure")),
    }));
  }

  async function drawFigures() {
    const packed = document.getElementById("plotly");
    if (!packed) return;
    const all = figures();
    try {
      run(await unpack(packed.textContent));
      const templates = readJson(document.querySelector("script.templates"));
      const draw = (scheme, width) => all.map(({ plot, content }) => {
        const layout = { ...content.layout, template: templates[scheme], width };
        const displayModeBar = innerWidth >= NARROW_PX;
        const options = { responsive: true, displaylogo: false, displayModeBar, modeBarButtons: [BUTTONS] };
        return Plotly.react(plot, structuredClone(content.data), structuredClone(layout), options);
      });
      const drawForScreen = () => draw(dark.matches ? "dark" : "light", undefined);
      await Promise.all(drawForScreen());
      dark.addEventListener("change", drawForScreen);
      addEventListener("beforeprint", () => draw("light", PRINT_WIDTH_PX));
      addEventListener("afterprint", drawForScreen);
    } catch (error) {
      for (const { plot } of all) plot.textContent = `This figure could not be drawn: ${error.message}`;
      throw error;
    }
  }

  // What a cell is sorted by: numbers before texts, and what is no number behind both.
  function sortKey(row, column) {
    const cell = row.cells[column];
    const data = cell.querySelector("data");
    const value = data ? Number(data.value.replace("inf", "Infinity")) : cell.textContent;
    return { value, rank: typeof value === "string" ? 1 : Number.isNaN(value) ? 2 : 0 };
  }

  function sortBy(table, column, ascending) {
    const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, key: sortKey(row, column) }));
    const sign = ascending ? 1 : -1;
    rows.sort(({ key: a }, { key: b }) => {
      if (a.rank !== b.rank) return a.rank - b.rank;
      if (a.rank === 2 || a.value === b.value) return 0;
      if (a.rank === 1) return sign * a.value.localeCompare(b.value, "en", { numeric: true });
      return a.value < b.value ? -sign : sign;
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  }

  function makeSortable(table) {
    if (table.tBodies[0].rows.length < 2) return;
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.title = "Sort by this column";
      button.addEventListener("click", () => {
        // Numbers are asked for by their largest first.
        const order = head.getAttribute("aria-sort");
        const ascending = order ? order === "descending" : !head.classList.contains("r");
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, column, ascending);
      });
      head.append(button);
    });
  }

  document.querySelectorAll("figure.table table").forEach(makeSortable);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
  drawFigures();
})();

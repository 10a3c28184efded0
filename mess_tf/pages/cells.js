// Cells in the colour of the exit where they left, for report and page alike.

/**
 * An SVG to lie on a photo, of whatever size.
 *
 * exits: by row and column of cells, the number of the exit.
 * rows, columns: where the cells begin, and the last one ends, in 0..1 of the photo.
 * hues: by exit.
 */
function cellsOverlay(exits, rows, columns, hues) {
  const made = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const svg = made("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": true });
  const areas = hues.map(() => "");
  let borders = "";
  exits.forEach((row, y) => {
    const [top, bottom] = [rows[y], rows[y + 1]];
    row.forEach((exit, x) => {
      const [left, right] = [columns[x], columns[x + 1]];
      areas[exit] += `M${left} ${top}H${right}V${bottom}H${left}Z`;
      if (x && row[x - 1] !== exit) borders += `M${left} ${top}V${bottom}`;
      if (y && exits[y - 1][x] !== exit) borders += `M${left} ${top}H${right}`;
    });
  });
  areas.forEach((d, exit) => svg.append(made("path", { class: "exit hue", style: `--hue:${hues[exit]}`, d, "data-exit": exit })));
  svg.append(made("path", { class: "border", d: borders }));
  return svg;
}

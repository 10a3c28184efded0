// Draws the charts and the image viewer of the report page from the JSON object that it holds.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hues = Object.fromEntries(data.exits.map((exit) => [exit.name, exit.hue]));
  const original = data.points.find((point) => point.kind === "original");

  // === Elements and numbers ===

  const SVG = "http://www.w3.org/2000/svg";

  /** An HTML or SVG element with attributes, listeners (on...) and children (elements or text). */
  function element(name, attributes = {}, ...children) {
    const made = /^(svg|g|path|circle|rect|line|text)$/.test(name) ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== false) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const hue = (exit) => ({ class: "hue", style: `--hue:${hues[exit]}` });
  const exitOf = (candidate) => candidate.split(".")[0];
  const digits4 = (value) => String(Number(value.toPrecision(4)));
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function table(header, rows, marked = -1) {
    const cells = (kind, row, k) => element("tr", { class: k === marked && "here" }, ...row.map((cell) => element(kind, {}, cell)));
    const body = rows.map((row, k) => cells("td", row, k));
    return element("table", {}, element("thead", {}, cells("th", header)), element("tbody", {}, ...body));
  }

  // === Charts ===

  /** Round numbers within [low, high], about `count` of them, and with how many decimals they are written. */
  function ticks([low, high], count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((multiple) => multiple * power >= raw * 0.999);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const values = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(k * step);
    return { values, decimals };
  }

  /** The range of some numbers, wider by a share of it at both ends. */
  function padded(values, share) {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const more = (high - low || Math.abs(high) || 1) * share;
    return [low - more, high + more];
  }

  /** An SVG with axes: {svg, x, y, inverse}, x and y from values to pixels, inverse from pixels to an x. */
  function axes(width, height, xs, ys, xlabel, ylabel) {
    const [left, right, top, bottom] = [48, 12, 22, 40];
    const x = (value) => left + ((value - xs[0]) / (xs[1] - xs[0])) * (width - left - right);
    const y = (value) => height - bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (height - top - bottom);
    const inverse = (pixel) => xs[0] + ((pixel - left) / (width - left - right)) * (xs[1] - xs[0]);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "group", "aria-label": `${ylabel} by ${xlabel}` });
    const across = ticks(xs, width / 90);
    for (const value of across.values) {
      svg.append(element("line", { class: "axis", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
      svg.append(element("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, value.toFixed(across.decimals)));
    }
    const up = ticks(ys, height / 42);
    for (const value of up.values) {
      svg.append(element("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      svg.append(element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(up.decimals)));
    }
    svg.append(element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xlabel));
    svg.append(element("text", { x: 4, y: 12 }, ylabel));
    return { svg, x, y, inverse };
  }

  /** Draws into `host` now and whenever its width changes. */
  function redrawn(host, draw) {
    let width = 0;
    const fit = () => {
      if (Math.abs(host.clientWidth - width) < 1 || host.clientWidth === 0) return;
      width = host.clientWidth;
      draw(width);
    };
    new ResizeObserver(fit).observe(host);
    fit();
  }

  /** Pixel position of a pointer in the coordinates of an SVG. */
  function pixel(svg, event) {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  /** Curves over a common axis; a pointer or the arrow keys read their values, of [x, y, value] the value. Areas end at the curve before. */
  function lineChart(host, { series, xlabel, ylabel, ys, xdigits, areas }) {
    const plot = element("div", { class: "chart" });
    const output = element("output", { "aria-live": "polite" }, "\u00a0");
    const key = element("ul", { class: "key" });
    for (const { name } of series) key.append(element("li", {}, element("span", hue(name), name)));
    host.append(plot, key, output);
    const stops = [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
    let at = -1;
    redrawn(plot, (width) => {
      const all = series.flatMap(({ points, chosen }) => (chosen ? [...points, chosen] : points));
      const yrange = ys || padded(all.map((point) => point[1]), 0.05);
      const { svg, x, y, inverse } = axes(width, 250, padded(all.map((point) => point[0]), 0.02), yrange, xlabel, ylabel);
      for (const { name, points, chosen } of areas ? [...series].reverse() : series) {
        const path = points.map(([px, py], k) => `${k ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
        const below = `V${y(yrange[0])}H${x(points[0][0]).toFixed(1)}Z`;
        const group = element("g", hue(name), element("path", areas ? { class: "area", d: path + below } : { class: "curve", d: path }));
        if (points.length === 1) group.append(element("circle", { class: "head", cx: x(points[0][0]), cy: y(points[0][1]), r: 4 }));
        if (chosen) group.append(element("circle", { class: "chosen", cx: x(chosen[0]), cy: y(chosen[1]), r: 6 }));
        svg.append(group);
      }
      const cursor = element("line", { class: "cursor", y1: 22, y2: 210, visibility: "hidden" });
      svg.append(cursor);
      const read = (index) => {
        at = clamp(index, 0, stops.length - 1);
        const nearest = (points) => points.reduce((best, point) => (Math.abs(point[0] - stops[at]) < Math.abs(best[0] - stops[at]) ? point : best));
        const values = series.map(({ name, points }) => `${name} ${digits4(nearest(points).at(-1))}`);
        output.textContent = `${xlabel} ${stops[at].toFixed(xdigits)}: ${values.join(", ")}`;
        for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(stops[at]));
        cursor.setAttribute("visibility", "visible");
      };
      const point = (event) => {
        const value = inverse(pixel(svg, event)[0]);
        read(stops.reduce((best, stop, k) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? k : best), 0));
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (step) {
          event.preventDefault();
          read(at + step);
        }
      });
      plot.replaceChildren(svg);
    });
  }

  // === The front ===

  const TITLES = { head: "alone", front: "Front", original: "Original network", chosen: "Chosen" };

  function frontChart(host) {
    const points = [...data.points].sort((a, b) => a.mean - b.mean);
    const front = points.filter((point) => point.kind === "front");
    const chosen = points.find((point) => point.kind === "chosen");
    const hidden = new Set();
    const visible = () => points.filter((point) => point.kind !== "head" || !hidden.has(point.exits[0].exit));
    const plot = element("div", {});
    const key = element("ul", { class: "key", "aria-label": "Heads shown" });
    const readout = element("div", { class: "readout", role: "status" });
    const hint = element("p", { class: "note hint" }, "Point at a value to read it, click or tap to pin it. With keys: ←/→ along the front, ↑/↓ along the heads, Enter pins, Esc unpins.");
    host.append(element("div", { class: "chart" }, plot, key), readout, hint);

    let current = chosen;
    let pinned = null;
    let mark = () => {};

    function titleOf(point) {
      if (point.kind === "head") return `${point.exits[0].exit}.${point.exits[0].head} alone`;
      if (point.kind === "front") return `Front, ${front.indexOf(point) + 1} of ${front.length}${point.open ? ", not proven" : ""}`;
      return TITLES[point.kind];
    }

    function headOf(exit) {
      const thresholds = exit.theta_img === null ? "" : `θ_pix ${exit.theta_pix.toFixed(4)}, θ_img ${exit.theta_img.toFixed(4)}`;
      return element("span", {}, exit.head, element("small", {}, thresholds));
    }

    function show(point) {
      current = point;
      const speedUp = point === original ? "" : ` (${(original.mean / point.mean).toFixed(2)}× as fast)`;
      const gain = point === original ? "" : ` (${signed(point.miou - original.miou, 2)} pp)`;
      const facts = [
        ["mIoU", `${point.miou.toFixed(2)} %${gain}`],
        ["mean", `${digits4(point.mean)} ${data.unit}${speedUp}`],
        ["p90", `${digits4(point.p90)} ${data.unit}`],
      ];
      if (point.exits[0].theta_img !== null) facts.push(["confidence", point.edge_aware ? "edge-aware" : "plain"]);
      const rows = point.exits.map((exit) => [element("span", hue(exit.exit), exit.exit), headOf(exit), percent(exit.leave)]);
      readout.replaceChildren(
        element("h3", {}, titleOf(point)),
        element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
        table(["exit", "head", "leave here"], rows),
        ...(pinned ? [element("p", { class: "hint" }, element("button", { type: "button", onclick: unpin }, "Unpin"))] : []),
      );
      mark();
    }

    function pin(point) {
      pinned = point;
      show(point);
    }

    function unpin() {
      pinned = null;
      show(current);
    }

    for (const { name } of data.exits) {
      const heads = points.filter((point) => point.kind === "head" && point.exits[0].exit === name);
      if (!heads.length) continue;
      const toggle = (event) => {
        hidden[hidden.has(name) ? "delete" : "add"](name);
        event.currentTarget.setAttribute("aria-pressed", !hidden.has(name));
        draw();
      };
      key.append(element("li", {}, element("button", { type: "button", "aria-pressed": true, onclick: toggle }, element("span", hue(name), `${name} alone`))));
    }

    function draw(width = plot.clientWidth) {
      const important = points.filter((point) => point.kind !== "head");
      const mious = important.flatMap((point) => [point.miou, ...(point.miou_interval || [])]);
      const floor = Math.min(...mious) - Math.max(3, 0.5 * (Math.max(...mious) - Math.min(...mious)));
      const shown = visible().filter((point) => point.miou >= floor);
      const xs = padded(shown.flatMap((point) => [point.mean, ...(point.mean_interval || [])]), 0.05);
      const ys = padded([...mious, ...shown.map((point) => point.miou)], 0.06);
      const { svg, x, y } = axes(width, width < 500 ? 320 : 430, xs, ys, `mean ${data.unit} per image`, "mIoU %");
      svg.setAttribute("aria-label", "Accuracy by cost; arrow keys step through the points, the values follow the chart");
      svg.append(element("line", { class: "dashed", x1: x(xs[0]), x2: x(xs[1]), y1: y(original.miou), y2: y(original.miou) }));
      for (const point of shown.filter((each) => each.kind === "head")) {
        svg.append(element("g", hue(point.exits[0].exit), element("circle", { class: "head", cx: x(point.mean), cy: y(point.miou), r: 3.5 })));
      }
      const steps = front.map((point, k) => (k ? `H${x(point.mean)}V${y(point.miou)}` : `M${x(point.mean)} ${y(point.miou)}`)).join("");
      if (front.length) svg.append(element("path", { class: "curve", d: `${steps}H${x(xs[1])}` }));
      for (const point of front) svg.append(element("circle", { class: "front", cx: x(point.mean), cy: y(point.miou), r: 3.5 }));
      const [low, high] = chosen.miou_interval.map(y);
      const [cheap, dear] = chosen.mean_interval.map(x);
      svg.append(element("path", { class: "whisker", d: `M${x(chosen.mean)} ${low}V${high}M${cheap} ${y(chosen.miou)}H${dear}` }));
      svg.append(element("rect", { class: "original", x: x(original.mean) - 6, y: y(original.miou) - 6, width: 12, height: 12 }));
      svg.append(element("circle", { class: "chosen", cx: x(chosen.mean), cy: y(chosen.miou), r: 7 }));
      const nearOriginal = Math.abs(x(original.mean) - x(chosen.mean)) < 60 && Math.abs(y(original.miou) - y(chosen.miou)) < 20;
      const tag = (point, text, above) => svg.append(element("text", { x: x(point.mean), y: y(point.miou) + (above ? -14 : 24), "text-anchor": "middle" }, text));
      tag(original, "original", !nearOriginal || original.miou >= chosen.miou);
      tag(chosen, "chosen", !nearOriginal || original.miou < chosen.miou);
      const below = visible().length - shown.length;
      if (below) svg.append(element("text", { x: 56, y: 384 - (width < 500 ? 110 : 0) }, `${below} heads lie below the chart`));
      const cursor = element("circle", { class: "cursor", r: 11 });
      svg.append(cursor);
      mark = () => {
        cursor.setAttribute("visibility", shown.includes(current) ? "visible" : "hidden");
        cursor.setAttribute("cx", x(current.mean));
        cursor.setAttribute("cy", y(current.miou));
      };
      mark();

      const nearest = (event) => {
        const [px, py] = pixel(svg, event);
        const distance = (point) => Math.hypot(x(point.mean) - px, y(point.miou) - py) - (point.kind === "head" ? 0 : 4);
        const best = shown.reduce((a, b) => (distance(b) < distance(a) ? b : a));
        return distance(best) < 40 ? best : null;
      };
      svg.addEventListener("pointermove", (event) => {
        const point = pinned ? null : nearest(event);
        if (point && point !== current) show(point);
      });
      svg.addEventListener("click", (event) => {
        const point = nearest(event);
        if (point && point !== pinned) pin(point);
        else unpin();
      });
      svg.addEventListener("keydown", (event) => {
        const [step, heads] = { ArrowLeft: [-1, false], ArrowRight: [1, false], ArrowDown: [-1, true], ArrowUp: [1, true] }[event.key] || [0];
        if (step) {
          const list = shown.filter((point) => (point.kind === "head") === heads);
          const after = list.includes(current) ? list.indexOf(current) + step : list.findIndex((point) => point.mean >= current.mean);
          pinned = null;
          if (list.length) show(list[clamp(after, 0, list.length - 1)]);
        } else if (event.key === "Enter") pin(current);
        else if (event.key === "Escape") unpin();
        else return;
        event.preventDefault();
      });
      plot.replaceChildren(svg);
    }

    redrawn(plot, draw);
    show(chosen);
  }

  // === Images ===

  const ORDERS = {
    lost: ["most lost by leaving first", (item) => -item.lost],
    worst: ["lowest mIoU first", (item) => item.miou],
    surest: ["surest first", (item) => -item.surest],
    exit: ["by exit", (item) => item.leaves],
  };

  function imageViewer(host) {
    let items = data.images;
    let at = 0;
    let shown = 0;

    const position = element("output", { "aria-live": "polite" });
    const order = element("select", { id: "order", onchange: sort });
    for (const [name, [label]] of Object.entries(ORDERS)) {
      if (name !== "surest" || data.images[0].exits[0].sure !== null || data.cells.length) order.append(element("option", { value: name }, label));
    }
    // What the panes show: the mask of an exit, by its number; first, where cells leave each for itself, that which comes of all.
    const views = [...(data.cells.length ? ["merged"] : []), ...data.shown.keys()];
    const exits = views.map((view) => {
      const name = view === "merged" ? view : element("span", hue(exitOf(data.shown[view])), exitOf(data.shown[view]));
      return element("button", { type: "button", onclick: () => choose(at, view) }, name);
    });
    const strip = element("div", { class: "strip", role: "group", "aria-label": "Images" });
    const panes = element("div", { class: "panes" });
    host.setAttribute("tabindex", 0);
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", "Image viewer; left and right arrow keys step through images, up and down through exits");
    host.append(
      element("div", { class: "tools" },
        element("button", { type: "button", onclick: () => choose(at - 1, null) }, "← Previous"),
        element("button", { type: "button", onclick: () => choose(at + 1, null) }, "Next →"),
        position,
        element("label", { class: "spread", for: "order" }, "Order"), order),
      strip,
      element("div", { class: "tools", role: "group", "aria-label": "Exit" }, ...exits),
      panes,
      element("p", { class: "note hint" }, "With keys: ←/→ other image, ↑/↓ other exit."),
    );
    host.addEventListener("keydown", (event) => {
      if (event.target === order) return;
      const [images, steps] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [0, 0];
      if (!images && !steps) return;
      event.preventDefault();
      choose(at + images, images ? null : views[clamp(views.indexOf(shown) + steps, 0, views.length - 1)]);
    });

    function sort() {
      const value = ORDERS[order.value][1];
      items = [...data.images].sort((a, b) => value(a) - value(b));
      strip.replaceChildren(...items.map((item, k) =>
        element("button", { type: "button", title: item.name, ...hue(exitOf(data.shown[item.leaves])), onclick: () => choose(k, null) },
          element("img", { src: item.photo, alt: item.name, width: item.size[0], height: item.size[1] }))));
      choose(0, null);
    }

    const SURE = "linear-gradient(to right,RAMP)".replace("RAMP", data.confidence_colours.join());
    const swatch = (background) => element("i", { style: `background:${background}` });
    const errorKey = () => element("span", { class: "swatches" }, ...data.errors.flatMap(([name, colour]) => [swatch(colour), `${name} `]));
    const confidenceKey = () => element("span", {}, "confidence: 0", element("i", { class: "ramp", style: `background:${SURE}` }), "1");

    /** How an image is left, in the order of the chosen exits, and what each is alone. */
    function facts(item) {
      const names = data.shown.map((candidate) => element("span", hue(exitOf(candidate)), exitOf(candidate)));
      const against = `${signed(-item.lost, 2)} pp against the original.`;
      if (item.cells) {
        const { shares, spent } = item.cells;
        const rows = item.exits.map((each, k) => [names[k], k in shares ? percent(shares[k]) : "–", k in spent ? digits4(spent[k]) : "–", each.miou.toFixed(2)]);
        rows.push(["merged", "", digits4(spent.reduce((sum, each) => sum + each, 0)), item.miou.toFixed(2)]);
        return [table(["exit", "cells", data.unit, "mIoU %"], rows, rows.length - 1), `Merged: ${against}`];
      }
      const rows = item.exits.map((each, k) => [
        names[k],
        each.miou.toFixed(2),
        each.sure === null ? "–" : `${each.sure.toFixed(1)} %`,
        data.needed[k] == null ? "–" : `${data.needed[k].toFixed(1)} %`,
      ]);
      return [table(["exit", "mIoU %", "sure pixels", "needed"], rows, item.leaves), `Left at ${exitOf(data.shown[item.leaves])}: ${against}`];
    }

    /** Shows an image at an exit; as it runs if none is given. */
    function choose(image, view) {
      at = (image + items.length) % items.length;
      const item = items[at];
      shown = view ?? (item.cells ? "merged" : item.leaves);
      position.textContent = `${at + 1} of ${items.length}`;
      exits.forEach((button, k) => button.setAttribute("aria-pressed", views[k] === shown));
      [...strip.children].forEach((button, k) => (k === at ? button.setAttribute("aria-current", true) : button.removeAttribute("aria-current")));
      const thumb = strip.children[at];
      strip.scrollLeft = thumb.offsetLeft - strip.offsetLeft - (strip.clientWidth - thumb.clientWidth) / 2;
      const picture = (source, alt) => element("img", { src: source, alt, width: item.size[0], height: item.size[1] });
      const pane = (source, alt, caption) => element("figure", {}, picture(source, alt), element("figcaption", {}, caption));
      const [figures, summary] = facts(item);
      panes.replaceChildren(
        pane(item.photo, `Image ${item.name}`, item.name),
        pane(item.label, "Its label", "label"),
        element("div", { class: "facts" }, figures, element("p", { class: "note" }, summary)),
      );
      if (shown === "merged") {
        const { exits: byCell, rows, columns, shares, mask, errors } = item.cells;
        const key = shares.map((share, k) => element("span", hue(exitOf(data.shown[k])), `${exitOf(data.shown[k])} ${percent(share)} `));
        const cells = cellsOverlay(byCell, rows, columns, shares.map((_, k) => hues[exitOf(data.shown[k])]));
        panes.append(
          element("figure", {}, element("div", { class: "cells" }, picture(item.photo, "Cells by the exit where they left"), cells), element("figcaption", {}, ...key)),
          pane(mask, "Merged mask", "merged mask"),
          pane(errors, "Errors of the merged mask", errorKey()),
        );
        return;
      }
      const [name, result] = [exitOf(data.shown[shown]), item.exits[shown]];
      panes.append(
        pane(result.mask, `Mask of ${name}`, `mask of ${name}`),
        pane(result.confidence, `Confidence of ${name}`, confidenceKey()),
        pane(result.errors, `Errors of ${name}`, errorKey()),
      );
    }

    sort();
  }

  // === The page ===

  frontChart(document.getElementById("front-chart"));
  imageViewer(document.getElementById("viewer"));
  if (data.rates.length) {
    lineChart(document.getElementById("rates-chart"), { series: data.rates, xlabel: "θ_img", ylabel: "% of images that leave", ys: [0, 105], xdigits: 4 });
  }
  if (data.cells.length) {
    lineChart(document.getElementById("cells-chart"), { series: data.cells, xlabel: "images in %, the surest first", ylabel: "% of the cells", ys: [0, 100], xdigits: 1, areas: true });
  }
  for (const { title, ylabel, series } of data.training) {
    const panel = element("div", {}, element("h3", {}, title));
    document.getElementById("training-charts").append(panel);
    lineChart(panel, { series, xlabel: "epoch", ylabel, xdigits: 1 });
  }
})();

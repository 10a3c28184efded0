// The page of the target `web`: what is opened, shown and chosen. What computes is mess.js.
import { Runner, cellEdges, pixelsOf, readPhoto } from "./mess.js";

const LARGEST = 1600; // pixels across of what is drawn; the network sees the whole photo

const byId = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);
const milliseconds = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);

/** An HTML element with attributes and children. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// === State: what is asked for, and the one loop that works on it ===

let runner = null;
let image = null; // ImageData
let video = null; // while the camera runs
let thresholds = [];
let deadlineMs = Infinity;
let [wanted, working, checking] = [false, false, false];
let cellsShown = false;
let redraw = () => {}; // what is shown already, once more

/** Runs what is asked for now; if something is running, after that. */
async function again() {
  wanted = true;
  if (working) return;
  setWorking(true);
  while (wanted) {
    wanted = false;
    try {
      await load();
      if (video) image = pixelsOf(video, video.videoWidth, video.videoHeight);
      const seen = image;
      if (seen) show(await runner.run(seen, { thresholds, deadlineMs }), seen);
      if (checking) await compare(seen);
    } catch (error) {
      tell(error.message ?? String(error), true);
      stop();
    }
    await new Promise(requestAnimationFrame); // so that the page is drawn and heard
    wanted ||= video !== null;
  }
  setWorking(false);
}

function setWorking(now) {
  working = now;
  byId("picture").setAttribute("aria-busy", now);
}

function tell(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

/** Makes the runner one of the accelerator that is chosen. */
async function load() {
  const asked = byId("accelerator").value;
  if (runner?.asked === asked) return;
  tell("Loading …");
  runner?.delete();
  runner = null;
  const began = performance.now();
  try {
    runner = await Runner.load(BUNDLE, WASM, asked);
  } catch (error) {
    if (asked === "wasm") throw error;
    byId("accelerator").value = "wasm";
    await load();
    tell(`WebGPU cannot run it here, so the processor does: ${error.message ?? error}`, true);
    return;
  }
  runner.asked = asked;
  const turned = runner.accelerator !== asked ? "; the graphics processor cannot run all of it, so the processor does" : "";
  tell(`Ready: loaded and run twice in ${((performance.now() - began) / 1000).toFixed(1)} s${turned}.`);
  introduce();
}

// === What is shown ===

/** All that only the bundle tells: once it is loaded. */
function introduce() {
  const { input, precision, segments, setting, classes, regions } = runner.manifest;
  const exits = segments.map(({ exit }) => exit).join(", ");
  byId("about").textContent =
    `${classes.length} classes, ${input.width}×${input.height} pixels, ${precision}, exits ${exits}, made to run ${setting}. ` +
    (regions ? `${regions.grid.join("×")} cells leave each for itself. ` : "") +
    "Photos stay in this browser.";
  byId("cells").hidden = byId("works-on").hidden = !regions;
  if (regions) byId("who").textContent = "each cell of an image";
  drawLegend(classNames());
  if (thresholds.length === 0) setControls();
  else setDeadline();
}

const hueOf = (index) => 300 - (205 * index) / Math.max(1, runner.manifest.segments.length - 1);
const exitNamed = (index) => element("span", { class: "hue", style: `--hue:${hueOf(index)}` }, runner.manifest.segments[index].exit);
const classNames = () =>
  runner.manifest.classes.map((name, k) => [element("i", { style: `background:rgb(${runner.manifest.palette[k]})` }), name]);

/** The legend: names, each a list of nodes, and what there is of each, 0 for nothing. */
function drawLegend(names, shares = names.map(() => 0), texts = shares.map(percent)) {
  const items = names.map((name, k) => element("li", { class: shares[k] ? "" : "absent" }, ...name, element("span", {}, shares[k] ? ` ${texts[k]}` : "")));
  byId("legend").replaceChildren(...items);
}

function setControls() {
  const { segments } = runner.manifest;
  thresholds = segments.map((segment) => segment.theta_img);
  byId("thresholds").replaceChildren(
    ...segments.flatMap(({ exit, theta_img: chosen }, index) => {
      if (chosen === null) return [];
      const value = element("output", {}, percent(chosen));
      const slider = element("input", { type: "range", min: 0, max: 1, step: "any", value: chosen, "data-exit": exit });
      slider.addEventListener("input", () => {
        thresholds[index] = Number(slider.value);
        value.textContent = percent(thresholds[index]);
        again();
      });
      return [element("label", {}, `threshold of ${exit} `, value, slider)];
    }),
  );
  deadlineMs = Infinity;
  setDeadline();
}

/** The deadline's slider, from what the first segment takes to more than all of them; its end is none. */
function setDeadline() {
  const slider = byId("deadline");
  byId("deadline-row").hidden = runner.manifest.segments.length === 1; // the first exit always counts
  slider.max = Math.ceil(1.5 * runner.fastestMs.reduce((sum, each) => sum + each, 0)) + 1;
  slider.step = slider.max > 100 ? 1 : 0.1;
  slider.min = slider.step;
  slider.value = Math.min(deadlineMs, slider.max);
  if (Number(slider.value) === Number(slider.max)) deadlineMs = Infinity;
  byId("deadline-value").textContent = deadlineMs === Infinity ? "none" : `${deadlineMs} ms`;
}

function show(result, image) {
  const { exit, trace, latencyMs, fitMs } = result;
  const { input, regions, segments } = runner.manifest;
  redraw = () => draw(result, image);
  redraw();
  byId("check").hidden = runner.accelerator === "wasm";
  byId("checked").textContent = "";
  byId("left").replaceChildren(regions ? "Deepest exit " : "Left at ", exitNamed(segments.findIndex((each) => each.exit === exit)));
  byId("times").replaceChildren(
    ...trace.map((step, index) => element("i", { class: "hue", style: `--hue:${hueOf(index)};flex-grow:${step.latencyMs}` })),
  );
  byId("trace").tBodies[0].replaceChildren(
    ...segments.map((segment, index) => {
      const step = trace[index];
      const cells = [percent(step?.confidence ?? null), percent(thresholds[index]), step ? milliseconds(step.latencyMs) : "–"];
      if (regions) cells.push(step ? String(step.budget) : "–");
      const kind = segment.exit === exit ? "here" : step ? "late" : "idle";
      return element("tr", { class: kind }, element("th", { scope: "row" }, exitNamed(index)), ...cells.map((cell) => element("td", {}, cell)));
    }),
  );
  byId("total").textContent =
    `${milliseconds(latencyMs)} ms together; before that ${milliseconds(fitMs)} ms to fit ${image.width}×${image.height} pixels to ${input.width}×${input.height}.`;
}

/** The photo with its mask, or with its cells in the colours of their exits, and the legend of the one or the other. */
function draw({ mask, trace, cells }, image) {
  const { input, palette, regions, segments } = runner.manifest;
  const asCells = cellsShown && cells !== null;
  const counted = (values, kinds) => {
    const counts = new Uint32Array(kinds);
    for (const value of values) counts[value]++;
    return Array.from(counts, (count) => count / values.length);
  };
  drawPhoto(image);
  drawMask(mask, palette, image);
  byId("picture").classList.toggle("cells", asCells);
  byId("picture").querySelector("svg")?.remove();
  if (asCells) {
    const [rows, columns] = regions.grid;
    const byRow = Array.from({ length: rows }, (_, row) => [...cells.subarray(row * columns, (row + 1) * columns)]);
    const edges = cellEdges(regions.grid, input, image);
    byId("picture").append(cellsOverlay(byRow, edges.rows, edges.columns, segments.map((_, index) => hueOf(index))));
    const shares = counted(cells, segments.length);
    const texts = shares.map((share, index) => `${percent(share)}, ${milliseconds(trace[index]?.latencyMs ?? 0)} ms`);
    drawLegend(segments.map((_, index) => [exitNamed(index)]), shares, texts);
  } else {
    drawLegend(classNames(), counted(mask, palette.length));
  }
}

function drawPhoto(image) {
  const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
  for (const id of ["photo", "mask"]) {
    const canvas = byId(id);
    canvas.width = Math.max(1, Math.round(scale * image.width));
    canvas.height = Math.max(1, Math.round(scale * image.height));
  }
  const whole = new OffscreenCanvas(image.width, image.height);
  whole.getContext("2d").putImageData(image, 0, 0);
  byId("photo").getContext("2d").drawImage(whole, 0, 0, byId("photo").width, byId("photo").height);
  byId("picture").classList.add("shown");
}

function drawMask(mask, palette, image) {
  const { width, height } = byId("mask");
  const colours = new Uint32Array(palette.map((rgb) => new Uint32Array(Uint8Array.of(...rgb, 255).buffer)[0]));
  const drawn = new ImageData(width, height);
  const pixels = new Uint32Array(drawn.data.buffer);
  for (let y = 0; y < height; y++) {
    const line = Math.floor(((y + 0.5) * image.height) / height) * image.width;
    for (let x = 0; x < width; x++) pixels[y * width + x] = colours[mask[line + Math.floor(((x + 0.5) * image.width) / width)]];
  }
  byId("mask").getContext("2d").putImageData(drawn, 0, 0);
}

function fade() {
  byId("picture").style.setProperty("--opacity", byId("opacity").value);
  byId("opacity-value").textContent = `${Math.round(100 * byId("opacity").value)} %`;
}

// === What people do ===

async function open(file) {
  stop();
  try {
    image = await readPhoto(file);
  } catch {
    tell(`${file.name}: must be a picture that this browser can show`, true);
    return;
  }
  tell(file.name);
  again();
}

/** Ends the camera; its last frame stays. */
function stop() {
  video?.srcObject.getTracks().forEach((track) => track.stop());
  video = null;
  byId("camera").setAttribute("aria-pressed", "false");
}

async function film() {
  if (video) return stop();
  const made = element("video", { playsinline: "" });
  made.muted = true;
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give it to pages of https and of localhost only");
    made.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 640 } } });
    await made.play();
  } catch (error) {
    tell(`Camera: ${error.message}`, true);
    return;
  }
  video = made;
  byId("camera").setAttribute("aria-pressed", "true");
  tell("Camera");
  again();
}

/** What WASM makes of the same image: graphics processors have been wrong without saying so. */
async function compare(image) {
  checking = false;
  const other = await Runner.load(BUNDLE, WASM, "wasm");
  const [here, there] = [await runner.run(image, { thresholds }), await other.run(image, { thresholds })];
  other.delete();
  const different = here.mask.reduce((count, value, k) => count + (value !== there.mask[k]), 0) / here.mask.length;
  const sameExit = here.exit === there.exit;
  byId("checked").textContent = sameExit ? `${percent(different)} of the pixels differ.` : `WASM leaves at ${there.exit}, WebGPU at ${here.exit}.`;
  byId("checked").classList.toggle("wrong", !sameExit || different > 0.01);
}

byId("open").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => byId("file").files.length && open(byId("file").files[0]));
byId("camera").addEventListener("click", film);
byId("accelerator").addEventListener("change", again);
byId("cells").addEventListener("click", () => {
  cellsShown = !cellsShown;
  byId("cells").setAttribute("aria-pressed", cellsShown);
  if (runner) redraw();
});
byId("deadline").addEventListener("input", () => {
  deadlineMs = Number(byId("deadline").value);
  setDeadline();
  again();
});
byId("opacity").addEventListener("input", fade);
byId("reset").addEventListener("click", () => {
  setControls();
  again();
});
byId("check").addEventListener("click", () => {
  stop();
  checking = true;
  again();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    byId("picture").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}
if (!navigator.gpu) byId("accelerator").options[1].disabled = true;
fade();
again();

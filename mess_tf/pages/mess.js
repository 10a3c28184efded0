// A bundle of mess_tf in the browser, on LiteRT.js: one segment after another, until an exit is sure of enough pixels or the time is up.
// With regions, each cell of the image leaves for itself, and a segment works on the smallest budget that holds the others.
//
// The same as mess_runtime in Python: `fit` has its bits, `Runner` its decisions. See docs/web.md.

import { Tensor, loadAndCompile, loadLiteRt, supportsFeature } from "@litertjs/core";

const GREY = 128; // around images that do not fill their frame
const WARMUP_RUNS = 2; // the first run touches the memory and makes shaders, the second has a typical latency
const SURE_ROUNDING = 1e-5; // a sum of as many float32 as a cell has pixels
const GONE = 2; // how sure a cell is that left before

// === Photos and their fit to the network ===

/** The pixels of a photo's file, upright as viewers show it, with the values that the file holds. */
export async function readPhoto(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const image = pixelsOf(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return image;
}

/** The pixels (ImageData, RGBA) of anything that can be drawn: a bitmap, a video, a canvas. */
export function pixelsOf(source, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Where an image of a size lies in the network's input: {left, top, width, height}. */
function placed(size, input) {
  let { width, height } = input;
  if (input.resize === "letterbox") {
    // Whole numbers, rounded half up.
    if (height * size.width <= width * size.height) {
      width = Math.min(width, Math.max(1, Math.floor((2 * size.width * height + size.height) / (2 * size.height))));
    } else {
      height = Math.min(height, Math.max(1, Math.floor((2 * size.height * width + size.width) / (2 * size.width))));
    }
  }
  return { left: (input.width - width) >> 1, top: (input.height - height) >> 1, width, height };
}

/** Lines of `size` pixels, resized to `newSize` pixels each. `from` and `to` say where the next pixel and line begin, in values. */
function resizedAlong(old, lines, size, from, newSize, to, made) {
  const scale = size / newSize;
  const reach = Math.max(1, scale);
  const firsts = new Int32Array(newSize);
  const weights = [];
  for (let position = 0; position < newSize; position++) {
    const centre = (position + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const stop = Math.min(size, Math.trunc(centre + reach + 0.5));
    const shares = [];
    for (let at = first; at < stop; at++) shares.push(Math.max(0, 1 - Math.abs((at - centre + 0.5) * (1 / reach))));
    const sum = shares.reduce((total, share) => total + share, 0);
    firsts[position] = first;
    weights.push(Int32Array.from(shares, (share) => Math.trunc(0.5 + (share / sum) * (1 << 22))));
  }
  for (let line = 0; line < lines; line++) {
    for (let position = 0; position < newSize; position++) {
      const shares = weights[position];
      let [red, green, blue] = [1 << 21, 1 << 21, 1 << 21];
      let at = line * from.line + firsts[position] * from.pixel;
      for (let k = 0; k < shares.length; k++, at += from.pixel) {
        red += shares[k] * old[at];
        green += shares[k] * old[at + 1];
        blue += shares[k] * old[at + 2];
      }
      const place = line * to.line + position * to.pixel;
      made[place] = red >> 22; // clamped: made is a Uint8ClampedArray
      made[place + 1] = green >> 22;
      made[place + 2] = blue >> 22;
    }
  }
  return made;
}

/**
 * An image (ImageData) at the network's input size: RGB values, grey where it does not fill it.
 *
 * Antialiased: a new pixel is the mean of the old ones around its centre, their weights falling linearly to 0 at a distance of
 * max(1, reduction); across the width first, then across the height, each rounded to whole values; weights in units of 2**-22.
 */
export function fit(image, input) {
  const { left, top, width, height } = placed(image, input);
  let [pixels, step, row] = [image.data, 4, 4 * image.width];
  if (width !== image.width) {
    const across = new Uint8ClampedArray(image.height * width * 3);
    pixels = resizedAlong(pixels, image.height, image.width, { pixel: step, line: row }, width, { pixel: 3, line: 3 * width }, across);
    [step, row] = [3, 3 * width];
  }
  if (height !== image.height) {
    const down = new Uint8ClampedArray(height * width * 3);
    pixels = resizedAlong(pixels, width, image.height, { pixel: row, line: step }, height, { pixel: 3 * width, line: 3 }, down);
    [step, row] = [3, 3 * width];
  }
  const fitted = new Uint8Array(input.height * input.width * 3).fill(GREY);
  for (let y = 0; y < height; y++) {
    let place = ((top + y) * input.width + left) * 3;
    for (let at = y * row; at < y * row + width * step; at += step) {
      fitted[place++] = pixels[at];
      fitted[place++] = pixels[at + 1];
      fitted[place++] = pixels[at + 2];
    }
  }
  return fitted;
}

/** A mask of the network at the size of the image that was fitted to it: of each pixel the class at its centre. */
export function maskAt(mask, input, size) {
  const { left, top, width, height } = placed(size, input);
  const nearest = (old, count) => Int32Array.from({ length: count }, (_, position) => Math.floor(((2 * position + 1) * old) / (2 * count)));
  const columns = nearest(width, size.width);
  const made = new Uint8Array(size.width * size.height);
  nearest(height, size.height).forEach((y, line) => {
    const from = (top + y) * input.width + left;
    for (let x = 0; x < size.width; x++) made[line * size.width + x] = mask[from + columns[x]];
  });
  return made;
}

/**
 * Where cells begin, and the last one ends, in 0..1 of an image of a size that was fitted to the network's input: {rows, columns}.
 *
 * grid: numbers of rows and columns, of which all are taken to be equally large. Those at the end are smaller where the network's map is
 *   no multiple of the cell.
 */
export function cellEdges(grid, input, size) {
  const { left, top, width, height } = placed(size, input);
  const edges = (count, whole, begin, length) =>
    Array.from({ length: count + 1 }, (_, k) => Math.min(Math.max(((k * whole) / count - begin) / length, 0), 1));
  return { rows: edges(grid[0], input.height, top, height), columns: edges(grid[1], input.width, left, width) };
}

// === Running ===

let started;

/**
 * Loads LiteRT.js, once in a page. On pages that are isolated from others (`crossOriginIsolated`) it computes on several threads.
 *
 * wasm: address of the folder `wasm` of the package @litertjs/core.
 */
function start(wasm) {
  started ??= supportsFeature("relaxedSimd").then((simd) => loadLiteRt(wasm, { threads: self.crossOriginIsolated && simd }));
  return started;
}

// Puts what a segment made in place of what the ones before made under the same names.
function replace(tensors, outputs) {
  for (const [name, tensor] of Object.entries(outputs)) {
    tensors[name]?.delete();
    tensors[name] = tensor;
  }
}

export class Runner {
  /**
   * Fetches and compiles a bundle, and runs it twice.
   *
   * bundle: address of a folder with manifest.json and model.tflite, as `export_tflite --target=web` writes it.
   * wasm: address of the folder `wasm` of the package @litertjs/core.
   * accelerator: "wasm" for the processor, "webgpu" for the graphics processor.
   */
  static async load(bundle, wasm, accelerator = "wasm") {
    const at = (name) => new URL(name, new URL(bundle, document.baseURI));
    const manifest = await (await fetched(at("manifest.json"))).json();
    const file = at("model.tflite");
    const [content] = await Promise.all([fetched(file).then((response) => response.arrayBuffer()), start(wasm)]);
    await checkContent(file, content, manifest);
    const gpuOptions = { precision: "fp32" }; // in half precision single pixels get another class than on the processor
    const model = await loadAndCompile(new Uint8Array(content), { accelerator, gpuOptions }).catch((error) => {
      throw new Error(`${file}: LiteRT.js cannot load it: ${error.message ?? error}`, { cause: error });
    });
    const runner = new Runner(manifest, model);
    for (let run = 0; run < WARMUP_RUNS; run++) await runner.#warmUp();
    return runner;
  }

  constructor(manifest, model) {
    this.manifest = manifest;
    this.model = model;
    /** What really computes: LiteRT.js turns to "wasm" where a graphics processor cannot run everything. */
    this.accelerator = model.options.accelerator;
    const { regions, segments } = manifest;
    /** Number of cells that leave each for itself, 0 if the image leaves as a whole. */
    this.cells = regions ? regions.grid[0] * regions.grid[1] : 0;
    /** By segment, its signatures by number of cells, rising; one that can only be dense has a single one. */
    this.forms = segments.map(({ exit }, index) => {
      const whole = [{ budget: this.cells, name: `segment.${exit}`, fastestMs: Infinity }];
      if (!regions || !index) return whole;
      const all = regions.budgets.map((budget) => ({ budget, name: `segment.${exit}.${budget}`, fastestMs: Infinity }));
      return all.filter(({ budget, name }) => budget === this.cells || name in model.signatures);
    });
  }

  /** By segment: the least time that it ever took on the whole image. */
  get fastestMs() {
    return this.forms.map((forms) => forms.at(-1).fastestMs);
  }

  /** Frees the memory. */
  delete() {
    this.model.delete();
  }

  /**
   * Segments an image.
   *
   * image: ImageData of any size.
   * thresholds: by segment, the share of confident pixels from which on an image leaves there, or with regions a cell, null to go on; by
   *   default the bundle's.
   * deadlineMs: a segment that cannot make it even in the least time it ever took is not started, one that turns out late does not count;
   *   the first one always counts. With regions, the largest budget that can make it is taken where the one that holds all cells cannot.
   *
   * Returns {mask, exit, trace, latencyMs, fitMs, cells}: mask, a class per pixel at the size of the image; exit, whose it is; trace, what was
   * run: {exit, confidence, latencyMs}, the time from a segment's inputs to its mask in memory; with regions, confidence is the share of the
   * cells that are sure, and there are budget, how many cells it worked on, and active, how many had no answer yet; cells, by rows, the
   * number of the exit that each has its answer from, null without regions.
   */
  async run(image, { thresholds = this.manifest.segments.map((segment) => segment.theta_img), deadlineMs = Infinity } = {}) {
    const { input, segments } = this.manifest;
    const began = performance.now();
    const pixels = fit(image, input);
    const fitMs = performance.now() - began;
    const tensors = { image: this.#tensor(pixels) };
    const trace = [];
    const cells = this.cells ? new Uint8Array(this.cells) : null;
    let [stands, spent, active, unsure] = [null, 0, this.cells, null];
    try {
      for (const [index, { exit }] of segments.entries()) {
        const able = this.forms[index].filter((form) => !index || spent + form.fastestMs <= deadlineMs);
        if (able.length === 0) break;
        const form = able.find(({ budget }) => budget >= active) ?? able.at(-1);
        const { mask, confident, sure, latencyMs } = await this.#step(form, tensors);
        const step = { exit, confidence: confident === null ? null : confident / (input.width * input.height), latencyMs };
        if (this.cells) Object.assign(step, { budget: form.budget, active });
        const threshold = thresholds[index];
        let leaves = threshold !== null && confident !== null && confident >= Math.ceil(threshold * input.width * input.height - 1e-9);
        if (sure !== null) {
          active = threshold === null ? this.cells : sure.filter((share) => share < threshold - SURE_ROUNDING).length;
          step.confidence = 1 - active / this.cells;
          leaves = active === 0;
        }
        trace.push(step);
        spent += latencyMs;
        if (index && spent > deadlineMs) break;
        stands = { mask, exit };
        // A segment works on the least sure cells, of equally sure ones on the first.
        if (cells && index) {
          const least = [...unsure.keys()].sort((a, b) => unsure[a] - unsure[b]).slice(0, form.budget);
          for (const cell of least) if (unsure[cell] < GONE) cells[cell] = index;
        }
        unsure = sure;
        if (leaves) break;
      }
    } finally {
      for (const tensor of Object.values(tensors)) tensor.delete();
    }
    // Of values that are not finite there may be no class.
    const { length } = this.manifest.classes;
    const top = stands.mask.reduce((most, value) => Math.max(most, value), 0);
    if (top >= length) throw new Error(`mask of ${stands.exit}: must be of classes 0 to ${length - 1}, got ${top}`);
    return { mask: maskAt(stands.mask, input, image), exit: stands.exit, trace, latencyMs: spent, fitMs, cells };
  }

  #tensor(pixels) {
    const { height, width, dtype } = this.manifest.input;
    return new Tensor(dtype === "uint8" ? pixels : Float32Array.from(pixels), [1, height, width, 3]);
  }

  /** Runs every signature once. */
  async #warmUp() {
    const { height, width } = this.manifest.input;
    const tensors = { image: this.#tensor(new Uint8Array(height * width * 3)) };
    try {
      for (const forms of this.forms) {
        let outputs = {};
        for (const form of forms) {
          // Each on what the segment before made: the answer of its own may have another size.
          Object.values(outputs).forEach((tensor) => tensor.delete());
          ({ outputs } = await this.#run(form, tensors));
        }
        replace(tensors, outputs);
      }
    } finally {
      for (const tensor of Object.values(tensors)) tensor.delete();
    }
  }

  /** Runs one signature and puts what it makes to the tensors, for those that come later. */
  async #step(form, tensors) {
    const { outputs, made } = await this.#run(form, tensors);
    replace(tensors, outputs);
    return made;
  }
  async #run(form, tensors) {
    const signature = this.model.signatures[form.name];
    const inputs = Object.fromEntries(signature.getInputDetails().map((each) => [each.name, tensors[each.name]]));
    const began = performance.now();
    const { confident_pixels: count, ...outputs } = await signature.run(inputs);
    const made = { mask: await outputs.mask.data(), confident: count ? (await count.data())[0] : null };
    made.sure = outputs.sure ? Array.from(await outputs.sure.data()) : null;
    made.latencyMs = performance.now() - began;
    count?.delete();
    form.fastestMs = Math.min(form.fastestMs, made.latencyMs);
    return { outputs, made };
  }
}

/** Throws unless a file is the one that the manifest describes; its hash is only known to pages from a secure context. */
async function checkContent(file, content, { size_bytes: size, sha256 }) {
  if (content.byteLength !== size) throw new Error(`${file}: must have ${size} bytes, got ${content.byteLength}`);
  if (!crypto.subtle) return;
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const received = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (received !== sha256) throw new Error(`${file}: must have the SHA-256 ${sha256}, got ${received}`);
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: must be there, got ${response.status} ${response.statusText}`);
  return response;
}

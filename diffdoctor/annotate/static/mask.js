// The mask as layers in image space; it knows no canvas and no zoom.
//
//   mask = forced where it is not 0, else (a part of map >= threshold that is kept, less the refused pixels)
//
// A part is kept unless its peak was refused, so that the answer depends on the threshold and the decisions alone:
// parts that split off a refused one stay refused, and moving the slider there and back changes nothing.

import { labelParts } from "./components.js";
import { cut, decodeRuns, encodeRuns, flood, paste, union } from "./raster.js";

export const LAYERS = ["refused", "forced", "ignore"];
const MAX_HISTORY_BYTES = 64 * 2 ** 20;

export class Mask {
  /** `map` is one byte a pixel, or null where no proposal is shown. */
  constructor(width, height, map, threshold) {
    Object.assign(this, { width, height, map, threshold });
    this.whole = { x: 0, y: 0, width, height };
    this.layers = Object.fromEntries(LAYERS.map((name) => [name, new Int8Array(width * height)]));
    this.labels = new Int32Array(map ? width * height : 0);
    this.runs = {}; // each layer's runs since it last changed
    this.mask = new Uint8Array(width * height);
    this.marked = 0;
    this.parts = [];
    this.undos = [];
    this.redos = [];
    this.edit = null;
    this.strokes = 0;
    this.listeners = [];
    this.#label();
  }

  /** `listener(box)` after each change of what is shown inside the box. */
  onChange(listener) {
    this.listeners.push(listener);
  }

  partAt(x, y) {
    if (!this.map || x < 0 || y < 0 || x >= this.width || y >= this.height) return null;
    return this.parts[this.labels[Math.floor(y) * this.width + Math.floor(x)] - 1] ?? null;
  }

  isKept(part) {
    return !this.layers.refused[part.peak];
  }

  get accepted() {
    return this.parts.filter((part) => this.isKept(part)).length;
  }

  get ignored() {
    return this.layers.ignore.includes(1);
  }

  /** The mask as it is sent: {0, 255}, rows from the top. */
  bytes() {
    return this.mask.slice();
  }

  ignoreBytes() {
    return this.layerBytes("ignore");
  }

  /** A layer as bytes: 0, `positive` where it is 1, `negative` where it is -1. */
  layerBytes(name, positive = 255, negative = 0) {
    const plane = this.layers[name],
      bytes = new Uint8Array(plane.length);
    for (let i = 0; i < plane.length; i++) if (plane[i]) bytes[i] = plane[i] > 0 ? positive : negative;
    return bytes;
  }

  isEmpty(name) {
    return !this.layers[name].includes(1) && !this.layers[name].includes(-1);
  }

  // Edits. Between begin() and end() shapes are painted on one layer; the whole is one step of the history.

  begin(layer) {
    if (this.edit) this.end();
    this.stash ??= new Int8Array(this.width * this.height);
    this.stash.set(this.layers[layer]);
    this.edit = { layer, box: null };
  }

  /** Sets the shape's pixels of the layer to `value`. */
  paint(shape, value) {
    if (!shape) return;
    const plane = this.layers[this.edit.layer];
    for (let j = 0, k = 0; j < shape.height; j++) {
      for (let i = (shape.y + j) * this.width + shape.x, end = i + shape.width; i < end; i++, k++) {
        if (shape.inside[k]) plane[i] = value;
      }
    }
    this.edit.box = union(this.edit.box, shape);
    delete this.runs[this.edit.layer];
    this.#compose(shape);
  }

  /** Closes the step; true where something changed. */
  end(kind = "drawn") {
    const { layer, box } = this.edit ?? {};
    this.edit = null;
    if (!box) return false;
    const before = cut(this.stash, this.width, box),
      after = cut(this.layers[layer], this.width, box);
    if (before.every((value, index) => value === after[index])) return false;
    if (kind === "drawn") this.strokes++;
    this.#push({ kind, patches: [{ layer, box, runs: encodeRuns(before) }] });
    return true;
  }

  /** Takes back what was painted since begin(). */
  cancel() {
    const { layer, box } = this.edit ?? {};
    this.edit = null;
    if (!box) return;
    paste(this.layers[layer], this.width, box, cut(this.stash, this.width, box));
    delete this.runs[layer];
    this.#compose(box);
  }

  /** One shape as one step. */
  draw(layer, shape, value) {
    this.begin(layer);
    this.paint(shape, value);
    return this.end();
  }

  /** Accepts or refuses parts of the proposal, in one step. */
  decide(parts, keep) {
    this.begin("refused");
    for (const part of parts) {
      if (!keep && !this.isKept(part)) continue;
      const inside = cut(this.labels, this.width, part.box);
      this.paint(
        { ...part.box, inside: Uint8Array.from(inside, (label) => (label === part.label ? 1 : 0)) },
        keep ? 0 : 1,
      );
    }
    return this.end("decided");
  }

  /** Moves the threshold. `settled` ends the movement: it becomes one step of the history. */
  setThreshold(threshold, settled = true) {
    this.sliding ??= this.threshold;
    if (threshold !== this.threshold) {
      this.threshold = threshold;
      this.#label();
      this.#changed(this.whole);
    }
    if (!settled) return;
    if (this.sliding !== threshold) this.#push({ kind: "threshold", threshold: this.sliding, patches: [] });
    this.sliding = null;
  }

  /** What a click at a pixel means: a marked spot is taken away, drawn or proposed, another one's part is accepted. One step. */
  toggle(x, y) {
    const index = y * this.width + x,
      marked = this.mask[index] > 0,
      part = this.partAt(x, y),
      { forced } = this.layers;
    const sign = marked ? 1 : -1,
      steps = this.undos.length;
    let changed =
      forced[index] === sign &&
      this.draw(
        "forced",
        flood(x, y, this.width, this.height, (i) => forced[i] === sign),
        0,
      );
    if (part && (this.isKept(part) === marked || this.layers.refused[index]))
      changed = this.decide([part], !marked) || changed;
    if (this.undos.length === steps + 2) this.undos.at(-2).patches.push(...this.undos.pop().patches);
    return changed;
  }

  /** Makes `bytes` the mask by drawing, in one step. */
  replace(bytes) {
    const forced = new Int8Array(bytes.length);
    for (let i = 0; i < forced.length; i++)
      if (Boolean(bytes[i]) !== Boolean(this.#base(i))) forced[i] = bytes[i] ? 1 : -1;
    return this.adopt({ ...this.layers, forced }, this.threshold);
  }

  /** Takes whole layers and a threshold in one step that can be undone; the proposal as it came is `{}` and its threshold. */
  adopt(planes, threshold) {
    const entry = { kind: "adopted", patches: [], threshold: this.threshold };
    for (const name of LAYERS) {
      const plane = this.layers[name],
        next = planes[name] ?? new Int8Array(plane.length);
      let i = 0;
      while (i < plane.length && plane[i] === next[i]) i++;
      if (i === plane.length) continue;
      entry.patches.push({ layer: name, box: this.whole, runs: encodeRuns(plane) });
      plane.set(next);
    }
    if (!entry.patches.length && threshold === this.threshold) return false;
    this.runs = {};
    this.threshold = threshold;
    this.#label();
    this.#push(entry);
    this.#changed(this.whole);
    return true;
  }

  get canUndo() {
    return this.undos.length > 0;
  }

  get canRedo() {
    return this.redos.length > 0;
  }

  undo() {
    return this.#step(this.undos, this.redos);
  }

  redo() {
    return this.#step(this.redos, this.undos);
  }

  /** Everything that a reload needs; `restore` takes it. Structured-cloneable, a few KB for drawings by hand. */
  save() {
    for (const name of LAYERS) this.runs[name] ??= encodeRuns(this.layers[name]);
    const layers = { ...this.runs };
    return {
      width: this.width,
      height: this.height,
      threshold: this.threshold,
      strokes: this.strokes,
      layers,
      undos: this.undos.slice(),
      redos: this.redos.slice(),
    };
  }

  restore(saved) {
    if (saved.width !== this.width || saved.height !== this.height) throw new Error("a draft of another size");
    for (const name of LAYERS) this.layers[name].set(decodeRuns(saved.layers[name], this.mask.length));
    Object.assign(this, {
      threshold: saved.threshold,
      strokes: saved.strokes,
      undos: saved.undos ?? [],
      redos: saved.redos ?? [],
      runs: {},
    });
    this.#label();
    this.#changed(this.whole);
  }

  #base(i) {
    return this.map && this.keep[this.labels[i]] && !this.layers.refused[i];
  }

  #label() {
    this.parts = this.map ? labelParts(this.map, this.width, this.height, this.threshold, this.labels) : [];
    this.#compose(this.whole, false);
  }

  #compose(box, tell = true) {
    const { mask, labels, width } = this,
      { refused, forced } = this.layers;
    const keep = (this.keep = new Uint8Array(this.parts.length + 1));
    for (const part of this.parts) keep[part.label] = refused[part.peak] ? 0 : 1;
    let change = 0;
    for (let y = box.y; y < box.y + box.height; y++) {
      for (let i = y * width + box.x, end = i + box.width; i < end; i++) {
        const force = forced[i];
        // Without a map `labels` is empty, and what is not there is no part.
        const value = force ? (force > 0 ? 255 : 0) : keep[labels[i]] && !refused[i] ? 255 : 0;
        if (value !== mask[i]) {
          mask[i] = value;
          change += value ? 1 : -1;
        }
      }
    }
    this.marked += change;
    if (tell) this.#changed(box);
  }

  #changed(box) {
    for (const listener of this.listeners) listener(box);
  }

  #push(entry) {
    this.redos = [];
    this.undos.push(entry);
    let bytes = 0,
      first = this.undos.length;
    while (first > 0 && (bytes += bytesOf(this.undos[first - 1])) <= MAX_HISTORY_BYTES) first--;
    if (first) this.undos.splice(0, first);
    this.#changed(null);
  }

  #step(from, to) {
    if (this.edit) this.end();
    const entry = from.pop();
    if (!entry) return null;
    const inverse = { kind: entry.kind, patches: [] };
    let box = null;
    for (const { layer, box: part, runs } of entry.patches) {
      inverse.patches.push({ layer, box: part, runs: encodeRuns(cut(this.layers[layer], this.width, part)) });
      paste(this.layers[layer], this.width, part, decodeRuns(runs, part.width * part.height));
      delete this.runs[layer];
      box = union(box, part);
    }
    if (entry.threshold !== undefined) {
      inverse.threshold = this.threshold;
      this.threshold = entry.threshold;
      this.#label();
      box = this.whole;
    } else if (box) this.#compose(box, false);
    to.push(inverse);
    this.#changed(box);
    return entry;
  }
}

function bytesOf(entry) {
  return entry.patches.reduce((sum, { runs }) => sum + runs.byteLength, 64);
}

// The editor: a picture, its mask, the tools and the panel beside it. It knows nothing of tasks, drafts or the server.

import { COLOURS, Overlay } from "./overlay.js";
import { TOOLS } from "./keys.js";
import { Mask } from "./mask.js";
import { $, make, toast } from "./page.js";
import { icon } from "./panels.js";
import { Tools } from "./tools.js";
import { View } from "./view.js";

export const TAGS = [
  ["missing-part", "Missing part"],
  ["extra-part", "Extra part"],
  ["text", "Garbled text"],
  ["whole-picture", "All over"],
];
const GROUPS = [["select"], ["lasso", "unlasso", "brush", "eraser", "polygon", "grow", "disc", "assist"], ["ignore"]];
const FLICKER_MS = 450;

export class Editor {
  /** `host.onEdit()` is told after each finished step; `host.onAssist(x, y)` gives a plane, or null. */
  constructor(host) {
    this.host = host;
    this.view = new View($("stage"));
    this.tools = new Tools(this.view, $("cursor"), {
      onTool: () => this.#showTool(),
      onEdit: () => this.#edited(),
      onHover: (part) => this.#focus(part),
      onAssist: (x, y) => host.onAssist(x, y),
    });
    this.tags = new Set();
    this.colour = localStorage.getItem("diffdoctor-annotate-colour") ?? "rose";
    this.view.onMove(() => {
      $("zoom").textContent = this.model ? `${Math.round(this.view.scale * 100)} %` : "";
    });
    this.#setUp();
    this.offerAssist(false);
    this.tools.use("lasso");
  }

  /** Shows the tool that asks a program, where the server has one. */
  offerAssist(on) {
    $("tool-assist").hidden = $("tool-assist").disabled = !on;
  }

  #setUp() {
    GROUPS.forEach((group, index) => {
      if (index) $("toolbar").append(make("hr"));
      for (const tool of group) {
        const { name, key } = TOOLS[tool];
        const button = make(
          "button",
          { type: "button", id: `tool-${tool}`, title: `${name} (${key})`, onclick: () => this.tools.use(tool) },
          icon(tool),
          make("span", { textContent: key }),
        );
        button.setAttribute("aria-label", name);
        $("toolbar").append(button);
      }
    });
    TAGS.forEach(([tag, text], index) =>
      $("tags").append(
        make(
          "button",
          {
            type: "button",
            id: `tag-${tag}`,
            title: `${text} (Shift+${index + 1})`,
            onclick: () => this.toggleTag(index),
          },
          text,
          make("kbd", { textContent: `⇧${index + 1}` }),
        ),
      ),
    );
    $("threshold").addEventListener("input", () => this.#slide(false));
    $("threshold").addEventListener("change", () => this.#slide(true));
    // The radius is 0.5 … 400 pixels on a logarithmic scale.
    $("size").addEventListener("input", () => {
      if (this.tools.tool === "grow") this.tools.tolerate(Math.round(1.28 * $("size").value));
      else this.tools.resize(0.5 * 800 ** ($("size").value / 100));
    });
    for (const [id, act] of Object.entries({
      "accept-all": () => this.decideAll(true),
      "refuse-all": () => this.decideAll(false),
      reset: () => this.reset(),
      undo: () => this.undo(),
      redo: () => this.redo(),
      hide: () => this.hide(),
      flicker: () => this.flicker(),
      colour: () => this.nextColour(),
      fit: () => this.view.fit(),
      one: () => this.view.zoomTo(1),
    }))
      $(id).addEventListener("click", act);
  }

  /** Shows a picture. `map` null: there is no proposal. */
  open({ picture, map, threshold }) {
    this.flicker(false);
    this.picture = picture;
    this.start = threshold;
    this.model = new Mask(picture.width, picture.height, map, threshold);
    this.overlay = new Overlay(this.model);
    this.overlay.colour = this.colour;
    this.overlay.render();
    this.model.onChange((box) => {
      if (box) this.view.update(box);
      this.#soon();
    });
    this.view.masked = true;
    this.view.open(picture, [this.overlay]);
    this.tools.open(this.model, () => Tools.readPixels(picture));
    this.tags = new Set();
    this.part = null;
    $("proposal").hidden = !map;
    $("tool-select").disabled = !map;
    if (!map && this.tools.tool === "select") this.tools.use("lasso");
    this.#histogram();
    this.refresh();
  }

  close() {
    this.flicker(false);
    this.tools.abandon();
    this.tools.model = this.model = null;
    this.view.close();
  }

  /** Whether the pointer may draw. */
  set enabled(enabled) {
    this.tools.enabled = enabled;
    $("stage").classList.toggle("locked", !enabled);
    this.#showTool();
    this.refresh();
  }

  get enabled() {
    return this.tools.enabled && Boolean(this.model);
  }

  /** What was changed by hand. */
  get touched() {
    return Boolean(this.model) && !(this.model.isEmpty("forced") && this.model.isEmpty("ignore"));
  }

  get damaged() {
    return this.model.marked > 0 || this.tags.size > 0;
  }

  setTags(tags) {
    this.tags = new Set(tags);
    this.refresh();
  }

  toggleTag(index) {
    const tag = TAGS[index]?.[0];
    if (!tag || !this.enabled) return;
    if (!this.tags.delete(tag)) this.tags.add(tag);
    this.#edited();
  }

  #edited() {
    this.refresh();
    this.host.onEdit();
  }

  #soon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.refresh();
    });
  }

  #slide(settled) {
    if (!this.enabled) return this.refresh();
    this.model.setThreshold(Number($("threshold").value), settled);
    if (!settled) return undefined;
    $("stage").focus();
    return this.#edited();
  }

  stepThreshold(by) {
    if (!this.enabled || !this.model.map) return;
    this.model.setThreshold(Math.max(1, Math.min(255, this.model.threshold + by)));
    this.#edited();
  }

  decideAll(keep) {
    if (this.enabled && this.model.decide(this.model.parts, keep)) this.#edited();
  }

  reset() {
    if (!this.enabled) return;
    if (this.model.adopt({}, this.start)) {
      toast("As it came. Z takes this back.");
      this.#edited();
    }
  }

  undo() {
    if (this.enabled && this.model.undo()) this.#edited();
  }

  redo() {
    if (this.enabled && this.model.redo()) this.#edited();
  }

  /** Goes to the next or previous part; false past the last. */
  nextPart(by) {
    const parts = this.model?.parts ?? [],
      at = this.part ? parts.findIndex((part) => part.label === this.part.label) : by > 0 ? -1 : parts.length;
    const part = parts[at + by] ?? null;
    this.#focus(part);
    if (!part) return false;
    if (!this.view.sees(part.box)) this.view.show(part.box, Math.max(1, this.view.scale));
    $("hint").textContent =
      `Part ${at + by + 1} of ${parts.length}, confidence ${Math.round(part.score * 100)} %, ${this.model.isKept(part) ? "accepted" : "refused"}. Space ${this.model.isKept(part) ? "refuses" : "accepts"} it.`;
    return true;
  }

  togglePart() {
    const current = this.part && this.model.parts[this.part.label - 1];
    if (!current || !this.enabled) return;
    this.tools.decide(current, !this.model.isKept(current));
    this.nextPart(0);
  }

  #focus(part) {
    this.part = part;
    if (!this.overlay || this.overlay.focus === (part?.label ?? 0)) return;
    const before = this.model.parts[this.overlay.focus - 1];
    this.overlay.focus = part?.label ?? 0;
    for (const one of [before, part]) if (one) this.view.update(one.box);
    if (!part) this.#showTool();
  }

  hide(hidden = this.view.masked) {
    this.flicker(false);
    this.view.masked = !hidden;
    this.view.redraw();
    $("hide").setAttribute("aria-pressed", String(hidden));
  }

  flicker(on = !this.flickering) {
    clearInterval(this.flickering);
    const was = this.flickering;
    this.flickering = on
      ? setInterval(() => {
          this.view.masked = !this.view.masked;
          this.view.redraw();
        }, FLICKER_MS)
      : null;
    $("flicker").setAttribute("aria-pressed", String(on));
    if (was && !on) {
      this.view.masked = true;
      this.view.redraw();
    }
    if (on) $("hide").setAttribute("aria-pressed", "false");
  }

  nextColour() {
    const names = Object.keys(COLOURS);
    this.colour = names[(names.indexOf(this.colour) + 1) % names.length];
    localStorage.setItem("diffdoctor-annotate-colour", this.colour);
    if (this.overlay) {
      this.overlay.colour = this.colour;
      this.view.update(this.overlay.whole);
    }
    this.refresh();
  }

  /** Shows the truth over one's own mask. */
  compare(truth) {
    this.overlay.truth = truth;
    this.view.update(this.overlay.whole);
  }

  #showTool() {
    const { tool, sized, size, tolerance } = this.tools;
    for (const name of Object.keys(TOOLS)) $(`tool-${name}`)?.setAttribute("aria-pressed", String(name === tool));
    $("hint").textContent = this.tools.enabled ? TOOLS[tool].hint : "";
    $("size-name").textContent = { grow: "Tolerance", disc: "Disc" }[tool === "grow" ? tool : sized] ?? "Brush";
    $("size").value = tool === "grow" ? tolerance / 1.28 : 100 * (Math.log(size / 0.5) / Math.log(800));
    $("size-value").textContent =
      tool === "grow" ? `± ${tolerance}` : `${size < 10 ? size.toFixed(1) : Math.round(size)} px`;
  }

  refresh() {
    const { model } = this,
      can = this.enabled;
    $("undo").disabled = !(can && model.canUndo);
    $("redo").disabled = !(can && model.canRedo);
    for (const id of ["clean", "skip", "unusable", "threshold", "accept-all", "refuse-all", "reset"])
      $(id).disabled = !can;
    $("colour").dataset.colour = this.colour;
    for (const [tag] of TAGS) $(`tag-${tag}`).setAttribute("aria-pressed", String(this.tags.has(tag)));
    if (!model) return;
    $("threshold").value = model.threshold;
    $("threshold-value").textContent = `${Math.round((100 * model.threshold) / 255)} %`;
    const { accepted, parts } = model;
    $("parts").textContent = parts.length ? `${accepted} of ${parts.length} accepted` : "nothing suspected";
    const share = (100 * model.marked) / model.mask.length;
    $("submit-text").textContent = model.marked
      ? `Damaged, ${share < 0.1 ? "< 0.1" : share.toFixed(1)} %`
      : this.tags.size
        ? "Damaged, tagged only"
        : "Clean";
  }

  /** How much of the picture each threshold would mark, on a square-root scale. */
  #histogram() {
    if (!this.model.map) return;
    const counts = new Float64Array(256),
      canvas = $("histogram"),
      pen = canvas.getContext("2d");
    for (const value of this.model.map) counts[value]++;
    const most = Math.max(1, ...counts.subarray(1));
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = "#8a919b";
    for (let value = 1; value < 256; value++) {
      const tall = counts[value] ? Math.max(2, Math.sqrt(counts[value] / most) * canvas.height) : 0;
      pen.fillRect(((value - 1) / 255) * canvas.width, canvas.height - tall, canvas.width / 255, tall);
    }
  }
}

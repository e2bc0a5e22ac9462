// Conflicts: everyone's masks side by side. A reviewer takes one, merges them, edits one, or asks one more person.

import * as api from "./api.js";
import { COLOURS, Overlay } from "./overlay.js";
import { $, make, message, noMessage, toast } from "./page.js";
import { View } from "./view.js";

const MERGES = {
  majority: ["Majority", (count, of) => 2 * count > of],
  union: ["Union", (count) => count > 0],
  intersection: ["Overlap", (count, of) => of > 0 && count === of],
};
const KEYS = {
  enter: "accept",
  c: "clean",
  u: "unusable",
  x: "reject",
  e: "edit",
  j: "majority",
  n: "union",
  o: "intersection",
  h: "hide",
  k: "colour",
  f: "guidelines",
  t: "theme",
  0: "fit",
  "?": "help",
};

export class Review {
  constructor(app) {
    Object.assign(this, { app, active: false, editing: false, tiles: [], chosen: null });
    const click = {
      "review-accept": "accept",
      "review-edit": "edit",
      "review-clean": "clean",
      "review-unusable": "unusable",
      "review-reject": "reject",
    };
    for (const [id, action] of Object.entries(click)) $(id).addEventListener("click", () => this.act(action));
    for (const button of document.querySelectorAll("[data-merge]"))
      button.addEventListener("click", () => this.act(button.dataset.merge));
  }

  async start() {
    this.active = true;
    this.task = null; // no key decides what is no longer shown
    document.body.removeAttribute("data-ready");
    this.#showEditor(false);
    $("comment").value = "";
    try {
      const task = await api.reviewNext();
      this.app.refreshCounts();
      if (task.task === null) {
        this.#clear();
        document.body.dataset.ready = "none";
        return message("No conflicts", "Nothing waits for a reviewer.", [
          { text: "Look again", primary: true, act: () => this.start() },
        ]);
      }
      await this.#open(task);
      noMessage();
    } catch (error) {
      this.app.failed(error, () => this.start());
    }
    return undefined;
  }

  stop() {
    this.active = false;
    this.editing = false;
    this.#clear();
    this.#showEditor(true);
    noMessage();
  }

  #clear() {
    $("tiles").replaceChildren();
    this.tiles = [];
    this.task = null;
  }

  #showEditor(shown) {
    $("review").hidden = shown;
    $("label").hidden = !shown;
    for (const id of ["tags-section", "skip"]) $(id).hidden = this.editing;
    $("back").disabled = !this.editing && !this.app.last;
  }

  async #open(task) {
    const length = task.height * task.width;
    const [{ bitmap }, map, { annotations, pairs }] = await Promise.all([
      api.picture(task.task),
      api.proposal(task.task, length),
      api.annotations(task.task),
    ]);
    const get = (one, name) =>
      one[name] ? api.annotationPlane(task.task, one.id, name, length) : Promise.resolve(null);
    const planes = await Promise.all(annotations.map((one) => Promise.all([get(one, "mask"), get(one, "ignore")])));
    this.#clear();
    Object.assign(this, { task, picture: bitmap, annotations, chosen: null });
    this.app.chips($("review-chips"), { ...task, category: task.category });
    $("review-chips").prepend(make("span", { className: "notable", textContent: task.reason }));
    $("review-prompt").textContent = task.prompt;
    annotations.forEach((one, index) =>
      this.#add({
        id: one.id,
        title: one.rater,
        verdict: one.verdict,
        mask: planes[index][0],
        ignore: planes[index][1],
        detail: [`${Math.round(one.active_ms / 1000)} s`, ...(one.late ? ["late"] : []), ...one.tags].join(", "),
      }),
    );
    if (map)
      this.#add({
        title: "Proposal",
        verdict: "",
        mask: map.map((value) => (value >= task.threshold ? 255 : 0)),
        proposal: true,
      });
    this.#pairs(pairs);
    this.choose(this.tiles[0]);
    $("tiles").focus();
    document.body.dataset.ready = String(task.task);
  }

  #add({ mask, ignore = null, ...tile }) {
    const stage = make("div", { className: "stage" }),
      number = this.tiles.length + 1;
    const marked = mask ? (100 * mask.reduce((sum, value) => sum + (value ? 1 : 0), 0)) / mask.length : 0;
    const caption = make(
      "div",
      { className: "caption" },
      make("kbd", { textContent: String(number) }),
      make("b", { textContent: tile.title }),
      make("span", {
        className: "number",
        textContent: [tile.verdict, mask && `${marked.toFixed(1)} %`, tile.detail].filter(Boolean).join(", "),
      }),
    );
    const element = make("div", { className: "tile", onclick: () => this.choose(entry) }, stage, caption);
    $("tiles").append(element);
    const { width, height } = this.picture,
      plane = mask ?? new Uint8Array(width * height);
    const overlay = new Overlay({ width, height, mask: plane, layers: ignore ? { ignore } : undefined });
    overlay.colour = this.app.editor.colour;
    overlay.render();
    const entry = { ...tile, mask: plane, ignore, element, overlay, view: new View(stage) };
    this.tiles.push(entry);
    this.#arrange();
    entry.view.open(this.picture, [overlay]);
    this.#move(entry, stage);
    return entry;
  }

  #arrange() {
    const columns = Math.ceil(Math.sqrt(this.tiles.length));
    $("tiles").style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  }

  /** Wheel and drag move all tiles together. */
  #move({ view }, stage) {
    const all = () => {
      for (const other of this.tiles) if (other.view !== view) other.view.follow(view);
    };
    let from = null;
    stage.addEventListener("pointerdown", (event) => {
      from = event;
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      if (from) {
        view.pan(event.clientX - from.clientX, event.clientY - from.clientY);
        from = event;
        all();
      }
    });
    for (const kind of ["pointerup", "pointercancel"])
      stage.addEventListener(kind, () => {
        from = null;
      });
    stage.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const { left, top } = stage.getBoundingClientRect();
        view.zoomTo(view.scale * Math.exp(-event.deltaY * 0.0016), { x: event.clientX - left, y: event.clientY - top });
        all();
      },
      { passive: false },
    );
  }

  #pairs(pairs) {
    const name = (id) => this.annotations.find((one) => one.id === id)?.rater ?? "?",
      show = (value) => (value === null ? "–" : value.toFixed(2));
    const cells = (tag, texts) => make("tr", {}, ...texts.map((textContent) => make(tag, { textContent })));
    $("pairs").replaceChildren(
      cells("th", ["", "IoU", "tolerant"]),
      ...pairs.map((pair) =>
        cells("td", [`${name(pair.a)}, ${name(pair.b)}`, show(pair.iou), show(pair.tolerant_iou)]),
      ),
    );
  }

  choose(tile) {
    if (!tile) return;
    this.chosen = tile;
    for (const one of this.tiles) one.element.setAttribute("aria-selected", String(one === tile));
    $("review-accept-text").textContent =
      tile.proposal || tile.merged ? `Take ${tile.title.toLowerCase()}` : `Accept ${tile.title}`;
  }

  /** A new tile with the merged mask, chosen. */
  merge(kind) {
    const [title, holds] = MERGES[kind],
      raters = this.tiles.filter((tile) => tile.id !== undefined && tile.verdict !== "unusable");
    const mask = this.picture ? new Uint8Array(this.tiles[0].mask.length) : null;
    for (let i = 0; i < mask.length; i++) {
      let count = 0;
      for (const tile of raters) if (tile.mask[i]) count++;
      if (holds(count, raters.length)) mask[i] = 255;
    }
    const ignores = raters.map((tile) => tile.ignore).filter(Boolean);
    const ignore = ignores.length ? mask.map((_, i) => (ignores.some((plane) => plane[i]) ? 255 : 0)) : null;
    const old = this.tiles.find((tile) => tile.merged);
    if (old) {
      old.element.remove();
      this.tiles.splice(this.tiles.indexOf(old), 1);
    }
    this.choose(this.#add({ title, verdict: "", detail: `of ${raters.length}`, mask, ignore, merged: true }));
  }

  edit() {
    const { editor } = this.app,
      { chosen, task } = this;
    this.editing = true;
    this.#showEditor(true);
    this.app.show({ task: { ...task, back: true }, picture: this.picture, map: null });
    editor.model.replace(chosen.mask);
    if (chosen.ignore) editor.model.layers.ignore.set(chosen.ignore.map((value) => (value ? 1 : 0)));
    editor.model.undos = [];
    editor.model.strokes = 0;
    editor.view.update(editor.model.whole);
    this.app.notice(`Editing ${chosen.title}. Submitting decides the conflict, Backspace goes back.`);
    $("back").disabled = false;
    editor.enabled = true;
    $("stage").focus();
    editor.view.resize();
    document.body.dataset.ready = `edit ${task.task}`;
  }

  cancelEdit() {
    this.editing = false;
    this.app.notice(null);
    this.app.editor.close();
    this.#showEditor(false);
    document.body.dataset.ready = String(this.task.task);
  }

  async submitEdit(verdict) {
    const { model } = this.app.editor;
    const planes = verdict === "damaged" ? { mask: model.bytes() } : {};
    if (model.ignored && verdict !== "unusable") planes.ignore = model.ignoreBytes();
    await this.decide("edit", { verdict, planes });
  }

  /** Sends the decision and opens the next conflict. */
  async decide(decision, { annotation = null, verdict, planes = {} } = {}) {
    if (this.sending) return;
    this.sending = true;
    try {
      const fields = { decision, annotation, comment: $("comment").value.trim(), ...(verdict ? { verdict } : {}) };
      const answer = await this.app.insist(() => api.review(this.task.task, fields, planes));
      document.body.dataset.reviewed = `${this.task.task} ${answer.state}`;
      toast(answer.state === "open" ? "One more person is asked" : "Decided");
      if (this.editing) {
        this.editing = false;
        this.app.notice(null);
        this.app.editor.close();
      }
      await this.start();
    } catch (error) {
      toast(error.message, 8000);
    } finally {
      this.sending = false;
    }
  }

  accept() {
    const { id, mask, ignore } = this.chosen;
    if (id !== undefined) return this.decide("accept", { annotation: id });
    const damaged = mask.includes(255);
    return this.decide("edit", {
      verdict: damaged ? "damaged" : "clean",
      planes: { ...(damaged ? { mask } : {}), ...(ignore ? { ignore } : {}) },
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return false;
    const tile = this.tiles[Number(event.key) - 1];
    if (tile) {
      this.choose(tile);
      return true;
    }
    return this.act(KEYS[event.key.toLowerCase()]);
  }

  act(action) {
    if (!this.task && !["theme", "help", "guidelines"].includes(action)) return false;
    const acts = {
      accept: () => this.accept(),
      edit: () => this.edit(),
      reject: () => this.decide("reject"),
      clean: () => this.decide("edit", { verdict: "clean" }),
      unusable: () => this.decide("edit", { verdict: "unusable" }),
      fit: () => this.tiles.forEach(({ view }) => view.fit()),
      hide: () =>
        this.tiles.forEach(({ view }) => {
          view.masked = !view.masked;
          view.redraw();
        }),
      colour: () => this.#recolour(),
    };
    if (MERGES[action]) this.merge(action);
    else if (acts[action]) acts[action]();
    else if (["theme", "help", "guidelines"].includes(action)) this.app.act(action);
    else return false;
    return true;
  }

  #recolour() {
    this.app.editor.nextColour();
    for (const { overlay, view } of this.tiles) {
      overlay.colour = Object.hasOwn(COLOURS, this.app.editor.colour) ? this.app.editor.colour : "rose";
      view.update(overlay.whole);
    }
  }
}

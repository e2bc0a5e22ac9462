// What the pointer does. Each tool paints shapes on a layer of the mask; Alt or the right button turns adding into removing.

import { Cursor, drawGuide } from "./guides.js";
import { TOOLS } from "./keys.js";
import { capsule, flood, polygon } from "./raster.js";

const CLOSE_PX = 10,
  CLICK_PX = 4;

export class Tools {
  /**
   * `view` is where, `host` is told: onTool(), onEdit() after each finished step, onHover(part); onAssist(x, y) gives a
   * plane, or null.
   */
  constructor(view, cursor, host) {
    Object.assign(this, {
      view,
      cursor: new Cursor(cursor),
      host,
      model: null,
      tool: "lasso",
      enabled: false,
      spaced: false,
      gesture: null,
      corners: [],
    });
    this.sizes = { brush: 24, eraser: 24, disc: 0 }; // radius in image pixels; the disc's is set by the picture
    this.tolerance = 24;
    this.fingers = new Map();
    const stage = view.element;
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    stage.addEventListener("pointerup", (event) => this.#up(event));
    stage.addEventListener("pointercancel", (event) => this.#lost(event));
    stage.addEventListener("lostpointercapture", (event) => this.#lost(event));
    stage.addEventListener("pointerleave", () => {
      this.cursor.hide();
      this.#hover(null);
    });
    stage.addEventListener("dblclick", () => this.finish());
    stage.addEventListener("contextmenu", (event) => event.preventDefault());
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    view.onMove(() => this.#guide());
  }

  open(model, pixels) {
    Object.assign(this, { model, pixels, corners: [], gesture: null, colours: null, last: null });
    // A small part of what one sees, whatever the picture's size; RichHF's points grew to a twentieth of the height.
    const base = Math.max(2, Math.round(Math.min(model.width, model.height) / 40));
    if (this.opened !== base)
      this.sizes = { brush: base, eraser: base, disc: Math.max(2, Math.round(model.height / 20)) };
    this.opened = base;
    this.#guide();
  }

  use(tool) {
    if (!TOOLS[tool]) return;
    this.abandon();
    this.tool = tool;
    this.last = null;
    this.#hover(null);
    this.view.element.dataset.tool = tool;
    this.#showCursor();
    this.host.onTool(tool);
  }

  get sized() {
    return this.tool in this.sizes ? this.tool : "brush";
  }

  get size() {
    return this.sizes[this.sized];
  }

  resize(radius) {
    const value = Math.max(0.5, Math.min(400, radius));
    if (this.sized === "disc") this.sizes.disc = value;
    else this.sizes.brush = this.sizes.eraser = value;
    this.#showCursor();
    this.host.onTool(this.tool);
  }

  tolerate(tolerance) {
    this.tolerance = Math.max(0, Math.min(255, tolerance));
    this.host.onTool(this.tool);
  }

  /** The key [ or ]: a fifth less or more, at least half a pixel. */
  scaleSize(sign) {
    if (this.tool === "grow") this.tolerate(this.tolerance + 4 * sign);
    else
      this.resize(sign > 0 ? Math.max(this.size + 0.5, this.size * 1.2) : Math.min(this.size - 0.5, this.size / 1.2));
  }

  /** Closes an open polygon; false where there is none. */
  finish() {
    if (!this.corners.length) return false;
    const corners = this.corners.splice(0);
    const value = this.removing ? -1 : 1;
    if (this.enabled && corners.length > 2)
      this.#draw("forced", polygon(corners, this.model.width, this.model.height), value);
    this.#guide();
    return true;
  }

  /** Takes the polygon's last corner back; false where there is none. */
  unclick() {
    if (!this.corners.length) return false;
    this.corners.pop();
    this.#guide();
    return true;
  }

  /** Gives up what is being drawn; false where nothing is. */
  abandon() {
    const was = Boolean(this.gesture || this.corners.length);
    if (this.gesture?.painting) this.model.cancel();
    this.gesture = null;
    this.corners = [];
    this.#guide();
    return was;
  }

  #layer() {
    return this.tool === "ignore" ? "ignore" : "forced";
  }

  #value(removing) {
    const takes = removing !== (this.tool === "eraser" || this.tool === "unlasso");
    return takes ? (this.tool === "ignore" ? 0 : -1) : 1;
  }

  #down(event) {
    if (!this.model) return;
    this.view.element.focus({ preventScroll: true });
    if (event.pointerType === "touch") {
      this.fingers.set(event.pointerId, event);
      if (this.fingers.size === 2) {
        this.abandon();
        this.gesture = { kind: "pinch" };
        return;
      }
    }
    if (this.gesture) return;
    this.view.element.setPointerCapture(event.pointerId);
    if (event.button === 1 || this.spaced) {
      this.gesture = { kind: "pan", x: event.clientX, y: event.clientY, id: event.pointerId };
      this.spacedUsed = true;
      return;
    }
    if (!this.enabled || event.button > 2) return;
    const at = this.view.toImage(event),
      removing = event.altKey !== (event.button === 2);
    const gesture = {
      kind: this.tool,
      id: event.pointerId,
      x: event.clientX,
      y: event.clientY,
      at,
      removing,
      value: this.#value(removing),
      path: [at],
    };
    const { width, height } = this.model;
    if (this.tool === "brush" || this.tool === "eraser") {
      gesture.painting = true;
      this.model.begin("forced");
      const from = event.shiftKey && this.last ? this.last : at;
      this.model.paint(capsule(from, at, this.size, width, height), gesture.value);
      this.last = at;
    } else if (this.tool === "disc") {
      this.#draw("forced", capsule(at, at, this.size, width, height), gesture.value);
    } else if (this.tool === "grow") {
      gesture.painting = true;
      gesture.tolerance = this.tolerance;
      this.model.begin("forced");
      this.#grow(gesture);
    } else if (this.tool === "polygon") {
      this.#corner(event, at, removing);
      return;
    }
    this.gesture = gesture;
  }

  #move(event) {
    if (!this.model) return;
    this.pointer = this.view.toImage(event);
    this.#showCursor(event);
    if (this.fingers.has(event.pointerId)) {
      if (this.gesture?.kind === "pinch") return this.#pinch(event);
      this.fingers.set(event.pointerId, event);
    }
    const { gesture } = this;
    if (!gesture) {
      if (this.tool === "select") this.#hover(this.model.partAt(this.pointer.x, this.pointer.y));
      if (this.corners.length) this.#guide();
      return;
    }
    if (gesture.id !== event.pointerId) return;
    if (gesture.kind === "pan") {
      this.view.pan(event.clientX - gesture.x, event.clientY - gesture.y);
      Object.assign(gesture, { x: event.clientX, y: event.clientY });
      return;
    }
    const events = event.getCoalescedEvents?.() ?? [],
      points = (events.length ? events : [event]).map((one) => this.view.toImage(one));
    if (gesture.kind === "brush" || gesture.kind === "eraser") {
      for (const point of points) {
        this.model.paint(capsule(this.last, point, this.size, this.model.width, this.model.height), gesture.value);
        this.last = point;
      }
    } else if (gesture.kind === "grow") {
      const tolerance = Math.round(Math.max(0, Math.min(255, this.tolerance + (event.clientX - gesture.x) / 3)));
      if (tolerance !== gesture.tolerance) {
        gesture.tolerance = tolerance;
        this.#growSoon(gesture);
      }
    } else {
      gesture.path.push(...points);
      this.#guide();
    }
  }

  #up(event) {
    this.fingers.delete(event.pointerId);
    const { gesture } = this;
    if (!gesture || (gesture.kind !== "pinch" && gesture.id !== event.pointerId)) return;
    this.gesture = null;
    const still =
      Math.hypot(event.clientX - gesture.x, event.clientY - gesture.y) < CLICK_PX && gesture.path?.length < 8;
    if (gesture.kind === "select") {
      if (still) this.#toggle(gesture.at);
    } else if (gesture.kind === "assist") {
      if (still) this.#assist(gesture);
    } else if (gesture.kind === "lasso" || gesture.kind === "unlasso" || gesture.kind === "ignore") {
      // A click with the lasso on a part of the proposal means the part; the pointer need not go to another tool first.
      if (!still) this.#draw(this.#layer(), polygon(gesture.path, this.model.width, this.model.height), gesture.value);
      else if (gesture.kind === "lasso") this.#toggle(gesture.at);
    } else if (gesture.painting) {
      if (gesture.kind === "grow") this.#grow(gesture);
      if (this.model.end()) this.host.onEdit();
      if (gesture.kind === "grow") this.tolerate(gesture.tolerance);
    }
    this.#guide();
  }

  /** The system took the pointer away: what was painted so far stays, as it would after a release. */
  #lost(event) {
    this.fingers.delete(event.pointerId);
    if (this.gesture?.id !== event.pointerId) return;
    if (this.gesture.painting && this.model.end()) this.host.onEdit();
    this.gesture = null;
    this.#guide();
  }

  #wheel(event) {
    event.preventDefault();
    if (!this.model) return;
    const { left, top } = this.view.element.getBoundingClientRect();
    const step = event.deltaY * (event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1);
    const point = { x: event.clientX - left, y: event.clientY - top };
    this.view.zoomTo(
      this.view.scale * Math.exp(-Math.max(-240, Math.min(240, step)) * (event.ctrlKey ? 0.01 : 0.0016)),
      point,
    );
  }

  #pinch(event) {
    const before = [...this.fingers.values()];
    this.fingers.set(event.pointerId, event);
    const after = [...this.fingers.values()];
    if (after.length !== 2) return;
    const apart = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    const middle = ([a, b]) => ({ x: (a.clientX + b.clientX) / 2, y: (a.clientY + b.clientY) / 2 });
    const { left, top } = this.view.element.getBoundingClientRect(),
      to = middle(after),
      from = middle(before);
    this.view.pan(to.x - from.x, to.y - from.y);
    this.view.zoomTo(this.view.scale * (apart(after) / Math.max(1, apart(before))), { x: to.x - left, y: to.y - top });
  }

  #draw(layer, shape, value) {
    if (shape && this.model.draw(layer, shape, value)) this.host.onEdit();
  }

  #toggle(point) {
    const { model } = this,
      x = Math.floor(point.x),
      y = Math.floor(point.y);
    if (x >= 0 && y >= 0 && x < model.width && y < model.height && model.toggle(x, y)) this.host.onEdit();
  }

  /** Draws what a program gives for a point, unless the picture is another one by then, or something is being drawn. */
  async #assist({ at, value }) {
    const { model } = this,
      { width, height } = model,
      x = Math.floor(at.x),
      y = Math.floor(at.y);
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    const inside = await this.host.onAssist(x, y);
    if (inside && this.model === model && this.enabled && !this.gesture)
      this.#draw("forced", { x: 0, y: 0, width, height, inside }, value);
  }

  decide(part, keep) {
    if (this.model.decide([part], keep)) this.host.onEdit();
  }

  #corner(event, at, removing) {
    if (this.corners.length > 2) {
      const first = this.view.toScreen(this.corners[0]),
        here = this.view.toScreen(at);
      if (Math.hypot(first.x - here.x, first.y - here.y) < CLOSE_PX) return void this.finish();
    }
    if (!this.corners.length) this.removing = removing;
    const last = this.corners.at(-1);
    if (!last || Math.hypot(last.x - at.x, last.y - at.y) * this.view.scale > 2) this.corners.push(at);
    this.#guide();
  }

  #growSoon(gesture) {
    this.growing ??= requestAnimationFrame(() => {
      this.growing = null;
      if (this.gesture === gesture) this.#grow(gesture);
    });
  }

  /** Pixels joined to the seed whose colour differs in no channel, nor half the map's value, by more than the tolerance. */
  #grow(gesture) {
    const { model } = this,
      { width, height, map } = model,
      x = Math.floor(gesture.at.x),
      y = Math.floor(gesture.at.y);
    if (gesture.grown === gesture.tolerance || x < 0 || y < 0 || x >= width || y >= height) return;
    gesture.grown = gesture.tolerance;
    const rgb = (this.colours ??= this.pixels()),
      seed = 4 * (y * width + x),
      near = gesture.tolerance;
    const joins = (i) =>
      Math.abs(rgb[4 * i] - rgb[seed]) <= near &&
      Math.abs(rgb[4 * i + 1] - rgb[seed + 1]) <= near &&
      Math.abs(rgb[4 * i + 2] - rgb[seed + 2]) <= near &&
      (!map || Math.abs(map[i] - map[seed / 4]) <= 2 * near);
    model.cancel();
    model.begin("forced");
    model.paint(flood(x, y, width, height, joins), gesture.value);
  }

  #hover(part) {
    if (this.hovered === part) return;
    this.hovered = part;
    this.host.onHover(part);
  }

  #showCursor(event) {
    const shown = this.enabled && this.tool in this.sizes && !this.spaced;
    this.cursor.show(this.view, shown ? this.size : null, event);
  }

  /** Draws the lasso's path or the polygon's corners. */
  #guide() {
    this.#showCursor();
    const { gesture, corners } = this;
    const path = corners.length
      ? [...corners, ...(this.pointer ? [this.pointer] : [])]
      : gesture && !gesture.painting
        ? gesture.path
        : null;
    const removing = corners.length ? this.removing : gesture?.value < 1;
    drawGuide(this.view, path ?? [], corners, this.tool === "ignore" ? "ignore" : removing ? "remove" : "add");
  }

  /** The picture's pixels as they are on the screen, for `grow`. */
  static readPixels(picture) {
    const context = new OffscreenCanvas(picture.width, picture.height).getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    return context.getImageData(0, 0, picture.width, picture.height).data;
  }
}

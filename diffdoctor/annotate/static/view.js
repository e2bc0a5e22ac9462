// A picture with overlays on a canvas: zoom, pan and the change between screen and image space. Scales are in device
// pixels an image pixel, so 1 is one to one on any screen. Only what changed is drawn again.

import { union } from "./raster.js";

const MAX_SCALE = 64,
  LARGE = 6, // of the window's pixels a side: where one of the picture's is as large, outlines are lines
  MARGIN = 24;

export class View {
  /** Fills `element` with a canvas for the picture and one for the guides of the tools. */
  constructor(element) {
    this.element = element;
    this.canvas = element.appendChild(document.createElement("canvas"));
    this.guides = element.appendChild(document.createElement("canvas"));
    this.guides.className = "guides";
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.pen = this.guides.getContext("2d");
    this.scale = 1;
    this.x = 0;
    this.y = 0; // device pixels of the image's corner
    this.picture = null;
    this.overlays = [];
    this.masked = true;
    this.fitted = true;
    this.listeners = [];
    this.frames = [];
    new ResizeObserver(() => this.resize()).observe(element);
    this.resize();
  }

  onMove(listener) {
    this.listeners.push(listener);
  }

  open(picture, overlays) {
    Object.assign(this, { picture, overlays, width: picture.width, height: picture.height });
    this.fit();
  }

  close() {
    this.picture = null;
    this.overlays = [];
    this.redraw();
  }

  resize() {
    const ratio = devicePixelRatio || 1,
      { clientWidth, clientHeight } = this.element;
    this.ratio = ratio;
    const width = Math.max(1, Math.round(clientWidth * ratio)),
      height = Math.max(1, Math.round(clientHeight * ratio));
    if (this.canvas.width === width && this.canvas.height === height) return;
    const dx = (width - this.canvas.width) / 2,
      dy = (height - this.canvas.height) / 2;
    for (const canvas of [this.canvas, this.guides]) {
      canvas.width = width;
      canvas.height = height;
    }
    if (this.fitted) this.fit();
    else this.#moved({ x: this.x + dx, y: this.y + dy });
  }

  get least() {
    const room = MARGIN * this.ratio;
    return Math.min((this.canvas.width - 2 * room) / this.width, (this.canvas.height - 2 * room) / this.height);
  }

  fit() {
    if (!this.picture) return this.redraw();
    const scale = Math.max(0.01, this.least);
    this.#moved({
      scale,
      x: (this.canvas.width - this.width * scale) / 2,
      y: (this.canvas.height - this.height * scale) / 2,
    });
    this.fitted = true;
  }

  /** Scales to `scale` and keeps the image point under the screen point (CSS pixels in the element; its middle if not given). */
  zoomTo(scale, point = { x: this.element.clientWidth / 2, y: this.element.clientHeight / 2 }) {
    if (!this.picture) return;
    scale = Math.min(MAX_SCALE, Math.max(Math.min(this.least, 1) / 2, scale));
    const px = point.x * this.ratio,
      py = point.y * this.ratio,
      factor = scale / this.scale;
    this.#moved({ scale, x: px - (px - this.x) * factor, y: py - (py - this.y) * factor });
  }

  pan(dx, dy) {
    this.#moved({ x: this.x + dx * this.ratio, y: this.y + dy * this.ratio });
  }

  /** Shows the image box in the middle, as large as fits, at most `most` pixels a pixel. */
  show(box, most = 8) {
    const scale = Math.min(most, (0.5 * this.canvas.width) / box.width, (0.5 * this.canvas.height) / box.height);
    this.#moved({ scale: Math.max(scale, this.least), x: 0, y: 0 });
    this.#moved({
      x: this.canvas.width / 2 - (box.x + box.width / 2) * this.scale,
      y: this.canvas.height / 2 - (box.y + box.height / 2) * this.scale,
    });
  }

  sees(box) {
    const a = this.toScreen({ x: box.x, y: box.y }),
      b = this.toScreen({ x: box.x + box.width, y: box.y + box.height });
    return a.x >= 0 && a.y >= 0 && b.x <= this.element.clientWidth && b.y <= this.element.clientHeight;
  }

  /** Image coordinates of a pointer event. */
  toImage(event) {
    const { left, top } = this.element.getBoundingClientRect();
    return {
      x: ((event.clientX - left) * this.ratio - this.x) / this.scale,
      y: ((event.clientY - top) * this.ratio - this.y) / this.scale,
    };
  }

  /** CSS pixels in the element of an image point. */
  toScreen(point) {
    return { x: (point.x * this.scale + this.x) / this.ratio, y: (point.y * this.scale + this.y) / this.ratio };
  }

  /** The same place as another view's, for pictures side by side. */
  follow(other) {
    const middle = {
      x: (other.canvas.width / 2 - other.x) / other.scale,
      y: (other.canvas.height / 2 - other.y) / other.scale,
    };
    const scale = this.least * (other.scale / other.least);
    Object.assign(this, {
      scale,
      x: this.canvas.width / 2 - middle.x * scale,
      y: this.canvas.height / 2 - middle.y * scale,
      fitted: false,
    });
    this.redraw();
  }

  #moved(change) {
    Object.assign(this, change, { fitted: false });
    if (this.picture) {
      // a corner of the picture always stays in sight
      const keep = 48 * this.ratio;
      this.x = Math.min(this.canvas.width - keep, Math.max(keep - this.width * this.scale, this.x));
      this.y = Math.min(this.canvas.height - keep, Math.max(keep - this.height * this.scale, this.y));
      const thickness =
        this.scale >= LARGE * this.ratio ? 0 : Math.min(6, Math.max(1, Math.round((1.6 * this.ratio) / this.scale)));
      for (const overlay of this.overlays)
        if (overlay.thickness !== thickness) {
          overlay.thickness = thickness;
          overlay.render();
        }
    }
    this.redraw();
    for (const listener of this.listeners) listener(this);
  }

  redraw() {
    this.dirty = null;
    this.everything = true;
    this.#ask();
  }

  /** Renders the overlays' box anew, and draws it in the next frame. */
  update(box) {
    if (!box) return;
    for (const overlay of this.overlays) this.dirty = union(this.dirty, overlay.render(box));
    this.#ask();
  }

  #ask() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#draw();
    });
  }

  /** The picture's pixels that a frame draws: those in sight, and of them only what has changed where that is known. */
  #drawn() {
    const seen = {
      x: Math.floor(-this.x / this.scale),
      y: Math.floor(-this.y / this.scale),
      width: Math.ceil(this.canvas.width / this.scale) + 1,
      height: Math.ceil(this.canvas.height / this.scale) + 1,
    };
    if (this.everything || !this.dirty) return seen;
    const { x, y, width, height } = this.dirty;
    return { x: x - 1, y: y - 1, width: width + 2, height: height + 2 };
  }

  #draw() {
    const begin = performance.now(),
      { context, canvas, scale } = this;
    context.save();
    if (!this.everything && this.dirty) {
      const margin = 2 * Math.ceil(this.ratio); // half a line
      const x = Math.floor(this.x + this.dirty.x * scale) - margin,
        y = Math.floor(this.y + this.dirty.y * scale) - margin;
      const [width, height] = [this.dirty.width, this.dirty.height].map((side) => Math.ceil(side * scale) + 2 * margin);
      context.beginPath();
      context.rect(x, y, width, height);
      context.clip();
    }
    context.fillStyle = getComputedStyle(this.element).getPropertyValue("--stage") || "#222";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.picture) {
      const place = [this.x, this.y, this.width * scale, this.height * scale];
      context.imageSmoothingEnabled = scale < 2;
      context.imageSmoothingQuality = "high";
      context.drawImage(this.picture, ...place);
      if (this.masked)
        for (const overlay of this.overlays) {
          context.drawImage(overlay.canvas, ...place);
          if (overlay.thickness === 0) overlay.stroke(context, this, this.#drawn());
        }
    }
    context.restore();
    this.everything = false;
    this.dirty = null;
    this.frames.push(performance.now() - begin);
    if (this.frames.length > 600) this.frames.shift();
  }
}

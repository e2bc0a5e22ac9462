// A mask as colours, in image space: one canvas as large as the picture, of which only changed boxes are redrawn. Where
// pixels are so large that an outline of whole ones would hide what it surrounds, it is drawn as lines between them.

const rgba = (red, green, blue, alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0; // little-endian

export const COLOURS = { rose: [255, 45, 120], cyan: [0, 215, 235], lime: [150, 235, 20] };
const TRUTH = [60, 200, 110];
const DARK = rgba(0, 0, 0, 100),
  FAINT = rgba(235, 235, 235, 190),
  GLOW = rgba(235, 235, 235, 60),
  HATCH = rgba(255, 190, 40, 215);

export class Overlay {
  /** `model` has width, height and mask; a `Mask` shows its refused parts and what is ignored as well. */
  constructor(model) {
    this.model = model;
    this.canvas = new OffscreenCanvas(model.width, model.height);
    this.context = this.canvas.getContext("2d");
    this.colour = "rose";
    this.focus = 0; // the label of the part under the pointer
    this.truth = null; // a mask to compare with
    this.thickness = 1; // of the outlines, in pixels of the picture; 0: lines between them, by `stroke`
  }

  get whole() {
    return { x: 0, y: 0, width: this.model.width, height: this.model.height };
  }

  /** The columns of each row from `top` to `low` between which there is anything to see: [first, one past the last] a row. */
  #extents(top, low) {
    const { width, mask, parts = [], layers } = this.model,
      extents = new Int32Array(2 * (low - top));
    for (let k = 0; k < extents.length; k += 2) extents[k] = width;
    const widen = (row, first, end) => {
      const k = 2 * (row - top);
      if (first < extents[k]) extents[k] = first;
      if (end > extents[k + 1]) extents[k + 1] = end;
    };
    for (const [plane, value] of [
      [mask, 255],
      [layers?.ignore, 1],
      [layers?.ignore, 255],
      [this.truth, 255],
    ]) {
      if (!plane) continue;
      for (let row = top; row < low; row++) {
        const values = plane.subarray(row * width, (row + 1) * width),
          first = values.indexOf(value);
        if (first >= 0) widen(row, first, values.lastIndexOf(value) + 1);
      }
    }
    for (const { box } of parts) {
      for (let row = Math.max(top, box.y), end = Math.min(low, box.y + box.height); row < end; row++)
        widen(row, box.x, box.x + box.width);
    }
    return extents;
  }

  /** Redraws the box, with a margin for the outlines; returns what was redrawn. */
  render(box = this.whole) {
    const { width, height, mask, labels, layers } = this.model,
      r = this.thickness, // 0: every pixel is compared with itself, so that none is an edge
      stripe = Math.max(1, r);
    const x0 = Math.max(0, box.x - r),
      y0 = Math.max(0, box.y - r);
    const x1 = Math.min(width, box.x + box.width + r),
      y1 = Math.min(height, box.y + box.height + r);
    if (x1 <= x0 || y1 <= y0) return box;
    const image = new ImageData(x1 - x0, y1 - y0),
      out = new Uint32Array(image.data.buffer);
    const [red, green, blue] = COLOURS[this.colour] ?? COLOURS.rose;
    const fill = rgba(red, green, blue, 84),
      line = rgba(red, green, blue, 255),
      strong = rgba(red, green, blue, r ? 150 : 120);
    const truthLine = rgba(...TRUTH, 255),
      truthFill = rgba(...TRUTH, 70);
    const { truth, focus } = this,
      parts = labels?.length ? labels : null,
      ignore = layers?.ignore,
      forced = layers?.forced;
    const top = Math.max(0, y0 - r),
      low = Math.min(height, y1 + r),
      extents = this.#extents(top, low);
    for (let y = y0; y < y1; y++) {
      let first = width,
        end = 0;
      for (const row of [y - r, y, y + r]) {
        if (row < top || row >= low) continue;
        first = Math.min(first, extents[2 * (row - top)]);
        end = Math.max(end, extents[2 * (row - top) + 1]);
      }
      first = Math.max(x0, first - r);
      end = Math.min(x1, end + r);
      const up = y >= r ? -r * width : 0,
        down = y + r < height ? r * width : 0;
      for (let x = first, k = (y - y0) * (x1 - x0) + first - x0; x < end; x++, k++) {
        const i = y * width + x,
          left = x >= r ? -r : 0,
          right = x + r < width ? r : 0;
        const on = mask[i],
          edge = on !== mask[i + left] || on !== mask[i + right] || on !== mask[i + up] || on !== mask[i + down];
        let colour = 0;
        if (on) colour = edge ? line : parts && focus && parts[i] === focus ? strong : fill;
        else if (edge) colour = DARK;
        else if (parts && parts[i] && !(forced && forced[i])) {
          // refused: a dashed outline
          const label = parts[i];
          const border =
            label !== parts[i + left] ||
            label !== parts[i + right] ||
            label !== parts[i + up] ||
            label !== parts[i + down];
          if (border) colour = ((x + y) / (3 * r)) & 1 ? FAINT : DARK;
          else if (label === focus) colour = GLOW;
        }
        if (ignore && ignore[i] !== 0 && (x + y) % (8 * stripe) < 2 * stripe) colour = HATCH;
        if (truth) {
          const is = truth[i],
            rim = is !== truth[i + left] || is !== truth[i + right] || is !== truth[i + up] || is !== truth[i + down];
          if (is && rim) colour = truthLine;
          else if (is && !on) colour = truthFill;
        }
        out[k] = colour;
      }
    }
    this.context.putImageData(image, x0, y0);
    return { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  }

  /** Draws the outlines within the box as lines between pixels; `place` has x, y and scale of the picture, and ratio. */
  stroke(context, place, box) {
    const { mask, labels, layers } = this.model,
      parts = labels?.length ? labels : null,
      forced = layers?.forced;
    const isRefused = (i) => parts && parts[i] && !mask[i] && !(forced && forced[i]) ? parts[i] : 0;
    const [red, green, blue] = COLOURS[this.colour] ?? COLOURS.rose,
      width = 1.6 * place.ratio,
      dash = 4 * place.ratio;
    context.save();
    const draw = (colour, path, dashes = []) => {
      context.setLineDash(dashes);
      for (const [style, thick] of [
        ["rgba(0, 0, 0, 0.6)", 2.2 * width],
        [colour, width],
      ]) {
        context.strokeStyle = style;
        context.lineWidth = thick;
        context.stroke(path);
      }
    };
    if (parts) draw("rgb(235, 235, 235)", this.#rims(isRefused, place, box), [dash, dash]);
    draw(`rgb(${red}, ${green}, ${blue})`, this.#rims((i) => mask[i], place, box));
    if (this.truth) draw(`rgb(${TRUTH.join(", ")})`, this.#rims((i) => this.truth[i], place, box));
    context.restore();
  }

  /** The lines between the box's pixels, and around the picture, where `value` of a pixel's index changes. */
  #rims(value, { x, y, scale }, box) {
    const { width, height } = this.model,
      path = new Path2D();
    const right = Math.min(width, box.x + box.width),
      low = Math.min(height, box.y + box.height);
    const at = (column, row) => (column < width && row < height && column >= 0 && row >= 0 ? value(row * width + column) : 0);
    const line = (x0, y0, x1, y1) => {
      path.moveTo(x + x0 * scale, y + y0 * scale);
      path.lineTo(x + x1 * scale, y + y1 * scale);
    };
    for (let row = Math.max(0, box.y); row <= low; row++)
      for (let column = Math.max(0, box.x); column <= right; column++) {
        const here = at(column, row);
        if (here !== at(column - 1, row)) line(column, row, column, row + 1);
        if (here !== at(column, row - 1)) line(column, row, column + 1, row);
      }
    return path;
  }
}

// A mask as colours, in image space: one canvas as large as the picture, of which only changed boxes are redrawn.

const rgba = (red, green, blue, alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0; // little-endian

export const COLOURS = { rose: [255, 45, 120], cyan: [0, 215, 235], lime: [150, 235, 20] };
const TRUTH = [60, 200, 110];

export class Overlay {
  /** `model` has width, height and mask; a `Mask` shows its refused parts and what is ignored as well. */
  constructor(model) {
    this.model = model;
    this.canvas = new OffscreenCanvas(model.width, model.height);
    this.context = this.canvas.getContext("2d");
    this.colour = "rose";
    this.focus = 0; // the label of the part under the pointer
    this.truth = null; // a mask to compare with
    this.thickness = 1;
    this.contours = false;
  }

  get whole() { return { x: 0, y: 0, width: this.model.width, height: this.model.height }; }

  /** Redraws the box, with a margin for the outlines; returns what was redrawn. */
  render(box = this.whole) {
    const { width, height, mask, labels, layers } = this.model, r = this.thickness;
    const x0 = Math.max(0, box.x - r), y0 = Math.max(0, box.y - r);
    const x1 = Math.min(width, box.x + box.width + r), y1 = Math.min(height, box.y + box.height + r);
    if (x1 <= x0 || y1 <= y0) return box;
    const image = new ImageData(x1 - x0, y1 - y0), out = new Uint32Array(image.data.buffer);
    const [red, green, blue] = COLOURS[this.colour] ?? TRUTH;
    const fill = this.contours ? 0 : rgba(red, green, blue, 84), line = rgba(red, green, blue, 255), strong = rgba(red, green, blue, 150);
    const dark = rgba(0, 0, 0, 100), faint = rgba(235, 235, 235, 190), hatch = rgba(255, 190, 40, 215);
    const truthLine = rgba(...TRUTH, 255), truthFill = rgba(...TRUTH, 70);
    const { truth, focus } = this, parts = labels?.length ? labels : null, ignore = layers?.ignore, forced = layers?.forced;
    for (let y = y0, k = 0; y < y1; y++) {
      const up = y >= r ? -r * width : 0, down = y + r < height ? r * width : 0;
      for (let x = x0; x < x1; x++, k++) {
        const i = y * width + x, left = x >= r ? -r : 0, right = x + r < width ? r : 0;
        const on = mask[i], edge = on !== mask[i + left] || on !== mask[i + right] || on !== mask[i + up] || on !== mask[i + down];
        let colour = 0;
        if (on) colour = edge ? line : parts && focus && parts[i] === focus ? strong : fill;
        else if (edge) colour = dark;
        else if (parts && parts[i] && !(forced && forced[i])) { // refused: a dashed outline
          const label = parts[i];
          const border = label !== parts[i + left] || label !== parts[i + right] || label !== parts[i + up] || label !== parts[i + down];
          if (border) colour = ((x + y) / (3 * r)) & 1 ? faint : dark;
          else if (label === focus) colour = rgba(235, 235, 235, 60);
        }
        if (ignore && ignore[i] > 0 && (x + y) % (8 * r) < 2 * r) colour = hatch;
        if (truth) {
          const is = truth[i], rim = is !== truth[i + left] || is !== truth[i + right] || is !== truth[i + up] || is !== truth[i + down];
          if (is && rim) colour = truthLine; else if (is && !on) colour = truthFill;
        }
        out[k] = colour;
      }
    }
    this.context.putImageData(image, x0, y0);
    return { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  }
}

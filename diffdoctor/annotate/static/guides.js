// What a tool shows before anything is drawn, in screen space: the brush's circle, the lasso's path, a polygon's corners.

const HUES = { add: "255, 45, 120", remove: "255, 255, 255", ignore: "255, 190, 40" };

/** The circle of a brush around the pointer. */
export class Cursor {
  constructor(element) {
    this.element = element;
  }

  hide() {
    this.element.hidden = true;
  }

  /** `radius` in image pixels, or null: none is shown. It appears with the first pointer event. */
  show(view, radius, event) {
    if (radius === null) return this.hide();
    if (event) {
      const { left, top } = view.element.getBoundingClientRect();
      this.at = { x: event.clientX - left, y: event.clientY - top };
      this.element.hidden = false;
    }
    const shown = Math.max(2, (radius * view.scale) / view.ratio),
      { style } = this.element;
    style.width = style.height = `${2 * shown}px`;
    if (this.at) style.transform = `translate(${this.at.x - shown}px, ${this.at.y - shown}px)`;
    return undefined;
  }
}

/** Draws a closed outline, `kind` one of add, remove and ignore, with handles at the corners; all in image space. */
export function drawGuide(view, path, corners, kind) {
  const { pen, guides, ratio } = view,
    hue = HUES[kind];
  pen.clearRect(0, 0, guides.width, guides.height);
  if (path.length < 2) return;
  pen.save();
  pen.scale(ratio, ratio);
  pen.lineJoin = "round";
  const outline = new Path2D();
  path
    .map((point) => view.toScreen(point))
    .forEach(({ x, y }, index) => (index ? outline.lineTo(x, y) : outline.moveTo(x, y)));
  pen.fillStyle = `rgba(${hue}, 0.18)`;
  pen.fill(outline);
  pen.lineWidth = 3.5;
  pen.strokeStyle = "rgba(0, 0, 0, 0.55)";
  pen.stroke(outline);
  pen.lineWidth = 1.75;
  pen.strokeStyle = `rgb(${hue})`;
  pen.setLineDash(kind === "remove" ? [5, 4] : []);
  pen.stroke(outline);
  pen.setLineDash([]);
  pen.lineWidth = 1;
  pen.strokeStyle = "rgba(0, 0, 0, 0.7)";
  corners.forEach((corner, index) => {
    const { x, y } = view.toScreen(corner);
    pen.beginPath();
    pen.arc(x, y, index ? 3 : 5, 0, 7);
    pen.fillStyle = index ? "#fff" : `rgb(${hue})`;
    pen.fill();
    pen.stroke();
  });
  pen.restore();
}

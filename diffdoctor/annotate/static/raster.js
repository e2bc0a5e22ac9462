// Shapes in image space. A shape is {x, y, width, height, inside}: a box and one byte a pixel of it, 1 inside.
// Pixel (i, j) covers [i, i + 1) x [j, j + 1); it belongs to a shape when its centre does.

function shapeOf(x0, y0, x1, y1, width, height) {
  const x = Math.max(0, Math.floor(x0)),
    y = Math.max(0, Math.floor(y0));
  const w = Math.min(width, Math.ceil(x1)) - x,
    h = Math.min(height, Math.ceil(y1)) - y;
  return w > 0 && h > 0 ? { x, y, width: w, height: h, inside: new Uint8Array(w * h) } : null;
}

/** Every pixel whose centre is at most `radius` from the segment a-b; at least the pixel under `b`. Null outside. */
export function capsule(a, b, radius, width, height) {
  const reach = Math.max(radius, 0.5);
  const shape = shapeOf(
    Math.min(a.x, b.x) - reach - 1,
    Math.min(a.y, b.y) - reach - 1,
    Math.max(a.x, b.x) + reach + 1,
    Math.max(a.y, b.y) + reach + 1,
    width,
    height,
  );
  if (!shape) return null;
  const dx = b.x - a.x,
    dy = b.y - a.y,
    length2 = dx * dx + dy * dy,
    limit = radius * radius;
  for (let j = 0; j < shape.height; j++) {
    const py = shape.y + j + 0.5 - a.y;
    for (let i = 0; i < shape.width; i++) {
      const px = shape.x + i + 0.5 - a.x;
      const t = length2 ? Math.min(1, Math.max(0, (px * dx + py * dy) / length2)) : 0;
      const ex = px - t * dx,
        ey = py - t * dy;
      if (ex * ex + ey * ey <= limit) shape.inside[j * shape.width + i] = 1;
    }
  }
  const i = Math.floor(b.x) - shape.x,
    j = Math.floor(b.y) - shape.y;
  if (i >= 0 && j >= 0 && i < shape.width && j < shape.height) shape.inside[j * shape.width + i] = 1;
  return shape;
}

/** The closed outline's inside by the non-zero rule, so that a lasso that crosses itself has no holes. Null outside. */
export function polygon(points, width, height) {
  if (points.length < 3) return null;
  const xs = points.map((p) => p.x),
    ys = points.map((p) => p.y);
  const least = (values) => values.reduce((a, b) => Math.min(a, b)),
    most = (values) => values.reduce((a, b) => Math.max(a, b));
  const shape = shapeOf(least(xs), least(ys), most(xs), most(ys), width, height);
  if (!shape) return null;
  const rows = Array.from({ length: shape.height }, () => []);
  points.forEach((a, index) => {
    const b = points[(index + 1) % points.length];
    if (a.y === b.y) return;
    const [top, low, turn] = a.y < b.y ? [a, b, 1] : [b, a, -1];
    const first = Math.max(0, Math.ceil(top.y - 0.5) - shape.y),
      last = Math.min(shape.height, Math.ceil(low.y - 0.5) - shape.y);
    for (let j = first; j < last; j++) {
      const x = top.x + ((shape.y + j + 0.5 - top.y) / (low.y - top.y)) * (low.x - top.x);
      rows[j].push([x, turn]);
    }
  });
  rows.forEach((crossings, j) => {
    crossings.sort((a, b) => a[0] - b[0]);
    let winding = 0;
    for (let k = 0; k + 1 < crossings.length; k++) {
      winding += crossings[k][1];
      if (!winding) continue;
      const from = Math.max(0, Math.ceil(crossings[k][0] - 0.5) - shape.x);
      const to = Math.min(shape.width, Math.ceil(crossings[k + 1][0] - 0.5) - shape.x);
      if (from < to) shape.inside.fill(1, j * shape.width + from, j * shape.width + to);
    }
  });
  return shape;
}

/** The pixels 4-connected to (x, y) for which `joins(index)` holds, at most `most` of them. Null where the seed does not. */
export function flood(x, y, width, height, joins, most = Infinity) {
  const seed = y * width + x;
  if (!joins(seed)) return null;
  const seen = new Uint8Array(width * height);
  let stack = new Int32Array(1024),
    top = 0,
    count = 0;
  let x0 = x,
    x1 = x,
    y0 = y,
    y1 = y;
  const push = (index) => {
    if (seen[index] || !joins(index)) return;
    seen[index] = 1;
    if (top === stack.length) {
      const larger = new Int32Array(top * 2);
      larger.set(stack);
      stack = larger;
    }
    stack[top++] = index;
  };
  push(seed);
  while (top && count < most) {
    const index = stack[--top],
      i = index % width,
      j = (index - i) / width;
    count++;
    if (i < x0) x0 = i;
    if (i > x1) x1 = i;
    if (j < y0) y0 = j;
    if (j > y1) y1 = j;
    if (i > 0) push(index - 1);
    if (i + 1 < width) push(index + 1);
    if (j > 0) push(index - width);
    if (j + 1 < height) push(index + width);
  }
  const shape = { x: x0, y: y0, width: x1 - x0 + 1, height: y1 - y0 + 1, inside: null };
  shape.inside = cut(seen, width, shape);
  return shape;
}

/** A copy of the box out of a plane that is `width` wide. */
export function cut(plane, width, box) {
  const out = new plane.constructor(box.width * box.height);
  for (let j = 0; j < box.height; j++) {
    const from = (box.y + j) * width + box.x;
    out.set(plane.subarray(from, from + box.width), j * box.width);
  }
  return out;
}

/** Writes `cut`'s answer back. */
export function paste(plane, width, box, values) {
  for (let j = 0; j < box.height; j++) {
    plane.set(values.subarray(j * box.width, (j + 1) * box.width), (box.y + j) * width + box.x);
  }
}

/** The smallest box around both; either may be null. */
export function union(a, b) {
  if (!a || !b) return a || b;
  const x = Math.min(a.x, b.x),
    y = Math.min(a.y, b.y);
  return {
    x,
    y,
    width: Math.max(a.x + a.width, b.x + b.width) - x,
    height: Math.max(a.y + a.height, b.y + b.height) - y,
  };
}

/** Runs of a plane of -1, 0 and 1: the value in the upper two bits, the length in the lower thirty. */
export function encodeRuns(plane) {
  let runs = new Int32Array(64),
    count = 0;
  for (let from = 0; from < plane.length;) {
    const value = plane[from];
    let to = from + 1;
    while (to < plane.length && plane[to] === value) to++;
    if (count === runs.length) {
      const larger = new Int32Array(count * 2);
      larger.set(runs);
      runs = larger;
    }
    runs[count++] = (value << 30) | (to - from);
    from = to;
  }
  return runs.slice(0, count);
}

/** `encodeRuns`, undone. */
export function decodeRuns(runs, length) {
  const plane = new Int8Array(length);
  let from = 0;
  for (const run of runs) {
    const to = from + (run & 0x3fffffff);
    plane.fill(run >> 30, from, to);
    from = to;
  }
  if (from !== length) throw new Error(`runs: expected ${length} values, got ${from}`);
  return plane;
}

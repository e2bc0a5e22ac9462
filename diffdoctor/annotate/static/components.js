// The connected parts of a confidence map: 8-connected and, as in diffdoctor.measures.components, at least
// max(0.02 % of the picture, 4 pixels). Smaller specks are no parts and not in the mask. Nothing is closed here.

const MIN_SHARE = 0.0002,
  MIN_PIXELS = 4;

/**
 * Labels `map >= threshold`.
 *
 * @param {Uint8Array} map the detector's map, one byte a pixel.
 * @param {Int32Array} labels receives each pixel's part, 1 .. parts.length, or 0.
 * @returns the parts, the most confident first: {label, box, area, score, peak}; peak is the index of the largest value.
 */
export function labelParts(map, width, height, threshold, labels) {
  let runs = new Int32Array(3 * 256),
    count = 0; // start, end and parent of each run
  const grow = () => {
    const larger = new Int32Array(runs.length * 2);
    larger.set(runs);
    runs = larger;
  };
  const root = (run) => {
    for (let parent = runs[3 * run + 2]; parent !== run; parent = runs[3 * run + 2]) {
      runs[3 * run + 2] = runs[3 * parent + 2]; // halves the path
      run = parent;
    }
    return run;
  };
  labels.fill(0);
  for (let y = 0, above = 0; y < height; y++) {
    const offset = y * width,
      first = count;
    for (let x = 0; x < width; x++) {
      if (map[offset + x] < threshold) continue;
      const from = x;
      while (x < width && map[offset + x] >= threshold) x++;
      if (3 * count + 3 > runs.length) grow();
      runs[3 * count] = offset + from;
      runs[3 * count + 1] = offset + x;
      runs[3 * count + 2] = count;
      // Runs of the row above that touch [from - 1, x + 1).
      for (let k = above; k < first; k++) {
        const start = runs[3 * k] + width - offset,
          end = runs[3 * k + 1] + width - offset;
        if (end < from) {
          above = k + 1;
          continue;
        }
        if (start > x) break;
        const a = root(k),
          b = root(count);
        if (a !== b) runs[3 * Math.max(a, b) + 2] = Math.min(a, b);
      }
      count++;
    }
    above = first;
  }
  const found = new Map();
  for (let k = 0; k < count; k++) {
    const key = root(k),
      start = runs[3 * k],
      end = runs[3 * k + 1];
    const y = Math.floor(start / width),
      x0 = start - y * width,
      x1 = end - y * width;
    let part = found.get(key);
    if (!part) found.set(key, (part = { x0, y0: y, x1, y1: y + 1, area: 0, sum: 0, peak: start }));
    part.x0 = Math.min(part.x0, x0);
    part.x1 = Math.max(part.x1, x1);
    part.y1 = y + 1;
    part.area += end - start;
    let sum = 0,
      peak = part.peak;
    for (let i = start; i < end; i++) {
      sum += map[i];
      if (map[i] > map[peak]) peak = i;
    }
    part.sum += sum;
    part.peak = peak;
  }
  const smallest = Math.max(MIN_SHARE * width * height, MIN_PIXELS);
  const parts = [...found.values()]
    .filter((part) => part.area >= smallest)
    .sort((a, b) => b.sum / b.area - a.sum / a.area)
    .map((part, index) => Object.assign(part, { label: index + 1 }));
  for (let k = 0; k < count; k++) {
    const part = found.get(root(k));
    if (part.label) labels.fill(part.label, runs[3 * k], runs[3 * k + 1]);
  }
  return parts.map(({ label, x0, y0, x1, y1, area, sum, peak }) => ({
    label,
    area,
    peak,
    score: sum / area / 255,
    box: { x: x0, y: y0, width: x1 - x0, height: y1 - y0 },
  }));
}

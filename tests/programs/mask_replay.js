// Run in the annotation page: edits, undo and redo at random against the list of states that they went through.
async () => {
  const { Mask } = await import("/static/mask.js"), { capsule } = await import("/static/raster.js");
  let seed = 1;
  const random = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
  const point = (w, h) => ({ x: random(w * 8) / 8, y: random(h * 8) / 8 });
  for (let trial = 0; trial < 80; trial++) {
    const w = 5 + random(50), h = 5 + random(40), map = new Uint8Array(w * h);
    for (let blob = 0; blob < 6; blob++) {
      const shape = capsule(point(w, h), point(w, h), 1 + random(4), w, h), value = random(256);
      if (shape) shape.inside.forEach((on, k) => { if (on) map[(shape.y + Math.floor(k / shape.width)) * w + shape.x + k % shape.width] = value; });
    }
    const model = new Mask(w, h, map, 26), show = () => model.bytes().join() + model.ignoreBytes().join() + model.threshold;
    const states = [show()];
    let at = 0;
    const step = (changed) => { if (changed) { states.length = ++at; states.push(show()); } };
    for (let move = 0; move < 50; move++) {
      const kind = random(10), before = model.threshold;
      if (kind < 3) step(model.draw(["forced", "ignore"][random(2)], capsule(point(w, h), point(w, h), random(5), w, h), random(3) - 1));
      else if (kind < 5 && model.parts.length) { const part = model.parts[random(model.parts.length)]; step(model.decide([part], !model.isKept(part))); }
      else if (kind === 5) { model.setThreshold(1 + random(255), false); model.setThreshold(1 + random(255)); step(model.threshold !== before); }
      else if (kind === 6) { model.begin("forced"); model.paint(capsule(point(w, h), point(w, h), 2, w, h), 1); model.cancel(); }
      else if (kind < 9) at -= model.undo() ? 1 : 0;
      else at += model.redo() ? 1 : 0;
      if (show() !== states[at]) return `trial ${trial}, move ${move}: another state`;
      if (model.marked !== model.bytes().filter(Boolean).length) return `trial ${trial}, move ${move}: miscounted`;
    }
    const other = new Mask(w, h, map, 26);
    other.restore(structuredClone(model.save()));
    while (model.undo() && other.undo());
    if (other.bytes().join() !== model.bytes().join()) return `trial ${trial}: another history after a reload`;
  }
  return "80 histories";
}
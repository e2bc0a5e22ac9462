const IDLE_MS = 20000;

/** Time at work: gaps of more than 20 s between inputs are breaks. */
export class Clock {
  constructor() {
    for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "input"])
      addEventListener(kind, () => this.tick(), { passive: true, capture: true });
    this.start();
  }

  start(active = 0, wall = 0) {
    Object.assign(this, { active, last: Date.now(), since: Date.now() - wall });
  }

  tick() {
    const now = Date.now();
    if (now - this.last <= IDLE_MS) this.active += now - this.last;
    this.last = now;
  }

  get wall() {
    return Date.now() - this.since;
  }
}

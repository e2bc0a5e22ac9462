// Nothing drawn is lost: each step goes to IndexedDB at once and to the server's draft a second later, again and again
// while there is no connection. One tab at a time may draw.

import * as api from "./api.js";

const PUT_AFTER_MS = 1000,
  KEPT_DAYS = 30;

function openStore() {
  return new Promise((resolve) => {
    const opening = indexedDB.open("diffdoctor-annotate", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("drafts");
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = opening.onblocked = () => resolve(null); // private windows may refuse; the server's draft remains
  });
}

class Store {
  constructor() {
    this.opened = openStore();
  }

  async #do(mode, act, { isWhole = false } = {}) {
    const database = await this.opened;
    if (!database) return undefined;
    return new Promise((resolve, reject) => {
      const transaction = database.transaction("drafts", mode, { durability: "relaxed" });
      const asked = act(transaction.objectStore("drafts"));
      // without waiting to hear of the request first, which a page that is left no longer does
      if (isWhole) transaction.commit?.();
      transaction.oncomplete = () => resolve(asked?.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }

  get(key) {
    return this.#do("readonly", (store) => store.get(key));
  }

  put(key, value) {
    return this.#do("readwrite", (store) => store.put(value, key), { isWhole: true });
  }

  delete(key) {
    return this.#do("readwrite", (store) => store.delete(key), { isWhole: true });
  }

  forget(before) {
    return this.#do("readwrite", (store) => {
      store.openCursor().onsuccess = ({ target: { result: cursor } }) => {
        if (!cursor) return;
        if (!(cursor.value.at >= before)) cursor.delete();
        cursor.continue();
      };
    });
  }
}

/** The layers as the draft's planes, without empty ones: forced 0, 1 or 2 (removed), the others 0 or 255. */
function planesOf(model) {
  const planes = {
    forced: () => model.layerBytes("forced", 1, 2),
    ignore: () => model.layerBytes("ignore"),
    refused: () => model.layerBytes("refused"),
  };
  return Object.fromEntries(
    Object.entries(planes)
      .filter(([name]) => !model.isEmpty(name))
      .map(([name, make]) => [name, make()]),
  );
}

function layersOf(planes) {
  const layer = (plane, minus) => {
    const values = new Int8Array(plane.length);
    for (let i = 0; i < plane.length; i++) if (plane[i]) values[i] = plane[i] === minus ? -1 : 1;
    return values;
  };
  return Object.fromEntries(
    Object.entries(planes).map(([name, plane]) => [name, layer(plane, name === "forced" ? 2 : null)]),
  );
}

export class Keeper {
  /** `host` is told: onState("saved" | "saving" | "offline" | "local"), onWritable(bool), onFree(), onLease(bool),
   *  onConflict(). */
  constructor(account, host) {
    Object.assign(this, { account, host, store: new Store(), task: null, attempts: 0 });
    this.store.forget(Date.now() - KEPT_DAYS * 86400e3).catch(() => {});
    addEventListener("online", () => this.#soon(0));
    document.addEventListener("visibilitychange", () => {
      if (document.hidden && this.dirty) this.#put();
    });
  }

  get key() {
    return `${this.account}/${this.task.task}`;
  }

  /** Takes a task and brings back the newest draft; `extra()` gives what else is to be kept. Returns that, or {}. */
  async open(task, stamp, model, extra, steal = false) {
    Object.assign(this, {
      task,
      stamp,
      model,
      extra,
      version: task.draft_version ?? 0,
      dirty: false,
      attempts: 0,
      remote: !task.back,
      held: false,
    });
    const writable = await this.#lock(steal);
    const state = await this.#restore();
    this.dirty &&= writable;
    if (this.dirty) this.#soon(PUT_AFTER_MS);
    this.host.onWritable(writable);
    this.host.onState(this.dirty ? "saving" : "saved");
    return state;
  }

  async #restore() {
    const { task, model } = this,
      length = task.width * task.height;
    const local = await this.store.get(this.key).catch(() => null);
    const remote =
      this.remote && task.has_draft
        ? await api.draft(task.task, length).catch((error) => {
            if (error.status) throw error;
            return null;
          })
        : null;
    if (remote) this.version = remote.version;
    const fits =
      local && local.stamp === this.stamp && local.mask.width === task.width && local.mask.height === task.height;
    if (fits && !(remote?.state.at > local.at)) {
      model.restore(local.mask);
      this.dirty = !(remote?.state.at === local.at);
      return local.extra;
    }
    if (!remote) return {};
    this.#adopt(remote);
    return remote.state.extra ?? {};
  }

  #adopt(remote) {
    this.model.adopt(layersOf(remote.planes), remote.state.threshold ?? this.model.threshold);
    this.model.strokes = remote.state.strokes ?? 0;
  }

  /** Web Locks: true when this tab is the one that draws. Else host.onFree() is told once the other lets go. */
  #lock(steal) {
    if (!navigator.locks || this.drawing) return true; // no locks: plain http on another host
    this.unlock?.();
    const name = `diffdoctor-annotate/${this.account}`,
      leave = new AbortController();
    const hold = () => new Promise((release) => leave.signal.addEventListener("abort", release));
    const wait = () =>
      navigator.locks
        .request(name, { signal: leave.signal }, () => {
          if (!leave.signal.aborted) this.host.onFree();
        })
        .catch(() => {});
    this.unlock = () => {
      this.drawing = false;
      leave.abort();
    };
    return new Promise((resolve) => {
      navigator.locks
        .request(name, steal ? { steal } : { ifAvailable: true }, (lock) => {
          this.drawing = Boolean(lock);
          resolve(this.drawing);
          if (lock) return hold();
          wait();
          return undefined;
        })
        .catch(() => {
          if (leave.signal.aborted) return;
          this.drawing = false; // another tab took over
          clearTimeout(this.timer);
          this.dirty = false;
          this.host.onWritable(false);
          wait();
        });
    });
  }

  /** After each finished step. */
  async touch() {
    this.dirty = true;
    this.at = Date.now();
    this.host.onState("saving");
    const record = { at: this.at, stamp: this.stamp, mask: this.model.save(), extra: this.extra() };
    this.#soon(PUT_AFTER_MS);
    await this.store.put(this.key, record).catch(() => {});
  }

  #soon(delay) {
    clearTimeout(this.timer);
    if (this.task && this.dirty && this.remote && !this.held) this.timer = setTimeout(() => this.#put(), delay);
    else if (this.task && !this.remote) this.host.onState("saved");
  }

  /** Renews the lease of someone who is looking without drawing. */
  renew() {
    if (this.task && this.remote) {
      this.dirty = true;
      this.#soon(0);
    }
  }

  /** Stops sending, so that no draft follows the annotation; `resume` goes on. */
  async hold() {
    clearTimeout(this.timer);
    this.held = true;
    await this.inflight;
  }

  resume() {
    this.held = false;
    this.dirty = true;
    this.#soon(PUT_AFTER_MS);
  }

  #put() {
    if (!this.sending && !this.held && this.task) this.inflight = this.#send();
  }

  async #send() {
    const { task, at } = this,
      { threshold, strokes } = this.model;
    this.sending = true;
    this.dirty = false;
    const fields = { fence: task.fence, state: { at: at ?? Date.now(), threshold, strokes, extra: this.extra() } };
    try {
      const answer = await api.putDraft(task.task, this.version, fields, planesOf(this.model));
      if (task !== this.task) return;
      Object.assign(this, { version: answer.version, attempts: 0 });
      this.host.onLease(answer.lease);
      this.host.onState(this.dirty ? "saving" : "saved");
    } catch (error) {
      if (task !== this.task) return;
      this.dirty = true;
      if (error instanceof api.Offline) {
        this.host.onState("offline");
        this.sending = false;
        return this.#soon(api.retryAfter(this.attempts++));
      }
      this.dirty = false;
      if (error.status === 409) {
        this.newer = error.body?.version;
        this.host.onConflict();
      } else this.host.onState("local", error.message);
    } finally {
      this.sending = false;
      if (this.task && this.dirty && !this.attempts) this.#soon(PUT_AFTER_MS);
    }
  }

  /** After a conflict: `mine` is written over the newer draft, or the newer one is taken (undo brings mine back). */
  async resolve(mine) {
    const { task } = this.task,
      length = this.task.width * this.task.height;
    if (mine) this.version = this.newer;
    else {
      const remote = await api.draft(task, length);
      if (remote) {
        this.version = remote.version;
        this.#adopt(remote);
        this.host.onExtra(remote.state.extra ?? {});
      }
    }
    await this.touch();
  }

  /** Lets the task go, with its draft, and another tab draw. */
  leave() {
    this.#forget();
    this.unlock?.();
    this.unlock = null;
  }

  /** The task was submitted or given back: its draft is not wanted any more. */
  async close() {
    const { key } = this;
    this.#forget();
    await this.store.delete(key).catch(() => {});
  }

  #forget() {
    clearTimeout(this.timer);
    this.task = null;
  }
}

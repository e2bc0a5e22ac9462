// One person's turn: taking a picture, keeping and submitting what was marked, going back to the last one.

import * as api from "./api.js";
import { Clock } from "./clock.js";
import { $, askToken, make, message, noMessage, toast } from "./page.js";
import { askReason, banner } from "./panels.js";

const AGAIN_MS = 15000,
  RENEW_MS = 240000;
const REASONS = ["I am not sure", "It would take too long", "Not my subject", "The page has a problem with it"];

/** Needs `editor`, `keeper`, `review`, `me` and `guidelines`, which the application sets. */
export class Session {
  constructor() {
    this.clock = new Clock();
    this.last = null; // the picture before, with everything that is needed to correct it
    setInterval(() => this.renew(), RENEW_MS);
  }

  /** Takes the lease and opens its picture; `steal` from another tab. */
  async next(steal = false) {
    clearTimeout(this.again);
    this.editor.enabled = false;
    document.body.removeAttribute("data-ready");
    banner("lease", null);
    banner("conflict", null);
    banner("offline", null);
    banner("tab", null);
    try {
      const task = await api.next();
      if (task.task === null) return this.nothing(task.reason);
      await this.open(task, steal);
      noMessage();
    } catch (error) {
      this.failed(error, () => this.next(steal));
    }
    return undefined;
  }

  async open(task, steal) {
    const [{ bitmap, stamp }, map] = await Promise.all([
      api.picture(task.task),
      api.proposal(task.task, task.height * task.width),
    ]);
    this.show({ task, picture: bitmap, stamp, map });
    const extra = await this.keeper.open(task, stamp, this.editor.model, () => this.extra(), steal);
    this.editor.setTags(extra.tags ?? []);
    this.clock.start(extra.active_ms ?? 0, extra.wall_ms ?? 0);
    this.ready();
  }

  show(current) {
    const { task, picture, map } = current;
    Object.assign(this, { current, feedback: null, sure: null });
    this.editor.enabled = false;
    this.editor.open({ picture, map, threshold: task.threshold });
    this.chips($("chips"), task);
    $("prompt").textContent = task.prompt;
    $("back").disabled = !this.last || Boolean(task.back);
    this.notice(task.back ? "You labelled this picture before. Submit again to correct it." : null);
  }

  chips(element, task) {
    const chip = (text, notable) => text && make("span", { textContent: text, className: notable ? "notable" : "" });
    element.replaceChildren(
      ...[
        chip(task.category),
        chip(task.training && "Training", true),
        chip(task.blind && "No proposal: mark what you see", true),
        chip(`${task.width} × ${task.height}`),
      ].filter(Boolean),
    );
  }

  ready() {
    $("stage").focus();
    document.body.dataset.ready = String(this.current.task.task);
  }

  notice(text) {
    $("notice").textContent = text ?? "";
    $("notice").hidden = !text;
  }

  extra() {
    this.clock.tick();
    return { tags: [...this.editor.tags], active_ms: this.clock.active, wall_ms: this.clock.wall };
  }

  edited() {
    this.sure = null;
    if (this.current && !this.feedback && !this.review.editing) this.keeper.touch();
  }

  renew() {
    if (this.current && this.editor.enabled && !this.review.active && Date.now() - this.clock.last < RENEW_MS)
      this.keeper.renew();
  }

  /** The plane that the server's program gives for a point; null, and its reason is shown, where there is none. */
  async assist(x, y) {
    const task = this.review.editing ? this.review.task : this.current?.task;
    try {
      return task ? await api.assist(task.task, x, y, task.width * task.height) : null;
    } catch (error) {
      toast(error.message, 5000);
      return null;
    }
  }

  resolve(mine) {
    banner("conflict", null);
    return this.keeper.resolve(mine).catch((error) => this.failed(error, () => this.resolve(mine)));
  }

  setWritable(yes) {
    this.editor.enabled = yes && !this.feedback;
    banner("tab", yes ? null : "You are drawing in another tab. Here you can only look.", [
      { text: "Draw here instead", act: () => this.next(true) },
    ]);
  }

  showSaved(state, text) {
    $("saved").dataset.state = state;
    $("saved").textContent =
      { saved: "Saved", saving: "Saving…", offline: "Kept here", local: "Kept here", kept: "Kept here" }[state] ?? "";
    banner(
      "offline",
      state === "offline"
        ? "No connection. Keep drawing: everything is kept in this browser and sent later."
        : state === "local"
          ? `The server does not take the draft: ${text} It is kept in this browser.`
          : null,
    );
  }

  showCounts() {
    const { labelled, open, conflicts } = this.me.counts,
      { training_left: training } = this.me;
    $("project").textContent = this.me.project;
    $("counts").textContent = training
      ? `${training} training picture${training > 1 ? "s" : ""} left`
      : `${labelled} labelled, ${open} left`;
    $("bar").max = Math.max(1, labelled + open);
    $("bar").value = labelled;
    $("conflicts").textContent = conflicts;
    $("conflicts").hidden = !conflicts;
  }

  async refreshCounts() {
    this.me = await api.me().catch(() => this.me);
    this.showCounts();
  }

  // Deciding.

  /** A verdict that throws drawings away asks for the key twice. */
  confirmed(verdict, text) {
    if (this.sure === verdict || !this.editor.touched) return true;
    this.sure = verdict;
    toast(`You drew here. ${text}`, 4000);
    return false;
  }

  async submit(verdict = this.editor.damaged ? "damaged" : "clean") {
    if (this.feedback) return this.next();
    if (this.review.editing) return this.review.submitEdit(verdict);
    if (!this.editor.enabled || !this.current || this.busy) return undefined;
    this.editor.tools.finish();
    const { model } = this.editor,
      { task } = this.current;
    const planes = verdict === "damaged" ? { mask: model.bytes() } : {};
    if (model.ignored && verdict !== "unusable") planes.ignore = model.ignoreBytes();
    this.clock.tick();
    const fields = {
      fence: task.fence,
      version: task.version,
      verdict,
      active_ms: this.clock.active,
      wall_ms: Math.max(this.clock.wall, this.clock.active),
      threshold: model.map ? model.threshold : null,
      accepted: verdict === "damaged" ? model.accepted : 0,
      refused:
        verdict === "damaged" ? model.parts.length - model.accepted : verdict === "clean" ? model.parts.length : 0,
      drawn: model.strokes,
      tags: verdict === "damaged" ? [...this.editor.tags] : [],
      guidelines: this.guidelines.hash,
    };
    return this.finish(async () => {
      const begin = performance.now();
      const [answer, hash] = await Promise.all([
        this.insist(() => this.send(task, fields, planes)),
        planes.mask && api.sha256(planes.mask),
      ]);
      this.submitMs = performance.now() - begin;
      if (hash && answer.sha256 && hash !== answer.sha256)
        throw new Error("The server received another mask than was sent. Nothing is lost: submit again.");
      document.body.dataset.submitted = `${task.task} ${answer.sha256 ?? verdict}`;
      this.last = {
        ...this.current,
        saved: model.save(),
        tags: [...this.editor.tags],
        active: this.clock.active,
        wall: this.clock.wall,
        version: answer.version,
      };
      await this.keeper.close();
      this.refreshCounts();
      if (answer.training) return this.teach(task, answer.training);
      return this.next();
    });
  }

  /** 409: an earlier answer of ours arrived although we did not hear so; then this is its correction. */
  async send(task, fields, planes) {
    try {
      return await api.annotate(task.task, fields, planes);
    } catch (error) {
      if (error.status !== 409) throw error;
      const { version } = await api.mine(task.task);
      if (version < fields.version) throw error;
      return api.annotate(task.task, { ...fields, version: version + 1 }, planes);
    }
  }

  /** Tries until there is an answer. */
  async insist(ask) {
    for (let attempt = 0; ; attempt++) {
      try {
        const answer = await ask();
        banner("sending", null);
        return answer;
      } catch (error) {
        if (!(error instanceof api.Offline)) throw error;
        banner(
          "sending",
          "No connection. Your answer is kept in this browser and sent as soon as the server is there.",
        );
        await new Promise((resolve) => {
          setTimeout(resolve, api.retryAfter(attempt));
          addEventListener("online", resolve, { once: true });
        });
      }
    }
  }

  /** Runs what ends this picture; the editor is shut meanwhile and open again after an error. */
  async finish(act) {
    this.busy = true;
    this.editor.enabled = false;
    this.showSaved("saving");
    await this.keeper.hold();
    try {
      await act();
    } catch (error) {
      banner("sending", null);
      if (error.status === 401) this.failed(error, () => this.start());
      else toast(error.message, 8000);
      this.editor.enabled = true;
      this.keeper.resume();
    } finally {
      this.busy = false;
    }
  }

  async teach(task, { hit, iou, verdict }) {
    const truth = await api.truth(task.task, task.width * task.height).catch(() => null);
    this.feedback = true;
    this.showSaved("");
    this.editor.hide(false);
    this.editor.view.fit();
    if (truth) this.editor.compare(truth);
    const overlap = iou === null || iou === undefined ? "" : ` Overlap ${Math.round(iou * 100)} %.`;
    this.notice(
      hit
        ? verdict === "clean"
          ? "Right: nothing is damaged here. Enter continues."
          : `Found.${overlap} Green is the truth. Enter continues.`
        : verdict === "clean"
          ? "Nothing is damaged here. Enter continues."
          : `Not quite.${overlap} Green is the truth. Enter continues.`,
    );
    $("submit-text").textContent = "Next picture";
    document.body.dataset.feedback = hit ? "hit" : "miss";
  }

  skip() {
    if (!this.editor.enabled || !this.current || this.busy || this.review.editing) return;
    if (this.current.task.back) {
      this.next();
      return;
    }
    askReason(REASONS, (reason) =>
      this.finish(async () => {
        await this.insist(() => api.release(this.current.task.task, this.current.task.fence, reason));
        await this.keeper.close();
        toast("Skipped");
        this.refreshCounts();
        await this.next();
      }),
    );
  }

  /** Opens the picture before for a correction; the present one keeps its draft. */
  async back() {
    if (this.review.editing) return this.review.cancelEdit();
    if (!this.last || this.busy || this.current?.task.back) return undefined;
    const { task, saved, tags, active, wall, version } = this.last;
    noMessage();
    document.body.removeAttribute("data-ready");
    this.show({ ...this.last, task: { ...task, back: true, version: version + 1 } });
    await this.keeper.open(this.current.task, this.current.stamp, this.editor.model, () => this.extra());
    this.editor.model.restore(saved);
    this.editor.setTags(tags);
    this.clock.start(active, wall);
    return this.ready();
  }

  // What is said instead of a picture.

  nothing(reason) {
    this.current = null;
    this.editor.close();
    this.showSaved("");
    document.body.dataset.ready = "none";
    const again = { text: "Look again", primary: true, act: () => this.next() };
    const back = this.last ? [{ text: "Back to the last picture", key: "Backspace", act: () => this.back() }] : [];
    if (reason === "elsewhere") {
      this.again = setTimeout(() => this.next(), AGAIN_MS);
      return message(
        "Others have the rest",
        "The pictures that are left are with other people just now. The page looks again by itself.",
        [again, ...back],
      );
    }
    if (reason === "paused")
      return message("Paused", this.me.paused_reason || "A reviewer will look at your last pictures with you.", [
        again,
      ]);
    return message("All done", "There is no picture left for you. Thank you.", [again, ...back]);
  }

  askToken(text) {
    askToken(text, (token) => {
      api.useToken(token);
      this.start();
    });
  }

  failed(error, again) {
    document.body.dataset.ready = "error";
    if (error.status === 401)
      return this.askToken("This token is not known here. Ask for a new one, or paste another.");
    const offline = error instanceof api.Offline;
    if (offline) this.again = setTimeout(again, AGAIN_MS / 3);
    return message(
      offline ? "No connection" : "That did not work",
      offline ? "The server does not answer. The page tries again by itself; what you drew is kept." : error.message,
      [{ text: "Try again", primary: true, act: again }],
    );
  }
}

// Pairs, one after another: both pictures appear at once, and an answer is kept until the server has it.

import { $, askToken, message, noMessage, setUpDialogs, setUpTheme, toast } from "./page.js";
import { ApiError, Offline, json, request, retryAfter, takeToken, useToken } from "./request.js";

const PENDING = "diffdoctor-compare-pending",
  TAB = "diffdoctor-compare-tab";
const KEYS = [
  [
    "Keys",
    [
      ["left", "←", "The left (upper) picture"],
      ["right", "→", "The right (lower) picture"],
      ["neither", "↓", "Neither is better"],
      ["back", "⌫", "Change the last answer"],
      ["zoom", "Click", "Look closer, at the same place of both"],
      ["theme", "T", "Light or dark"],
      ["help", "?", "Keys"],
    ],
  ],
];
const ACTIONS = {
  ArrowLeft: "left",
  ArrowRight: "right",
  ArrowDown: "neither",
  Backspace: "back",
  t: "theme",
  T: "theme",
  "?": "help",
};

function tab() {
  let name = sessionStorage.getItem(TAB);
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint32Array(4)), (value) => value.toString(16)).join("");
    sessionStorage.setItem(TAB, name);
  }
  return name;
}

class App {
  constructor() {
    Object.assign(this, { current: null, last: null, busy: false, attempts: 0 });
    this.theme = setUpTheme();
    setUpDialogs(KEYS, () => $("stage"));
    for (const choice of ["left", "right", "neither"])
      $(`choose-${choice}`).addEventListener("click", () => this.choose(choice));
    $("back").addEventListener("click", () => this.back());
    $("theme").addEventListener("click", () => this.theme());
    $("open-help").addEventListener("click", () => $("help").showModal());
    $("pictures").addEventListener("click", (event) => this.zoom(event));
    $("pictures").addEventListener("pointermove", (event) => this.look(event));
    addEventListener("keydown", (event) => this.key(event));
  }

  async start() {
    if (!takeToken()) return this.askToken("Open the link that you were given, or paste your token.");
    try {
      this.me = await json("GET", "/api/me");
    } catch (error) {
      return this.failed(error, () => this.start());
    }
    $("question").textContent = this.me.question;
    for (const key of Object.keys(localStorage).filter((key) => key.startsWith(this.pending("")))) await this.send(key);
    return this.next();
  }

  key(event) {
    const action = ACTIONS[event.key];
    if (!action || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]") || event.target.matches?.("input")) return;
    event.preventDefault();
    if (action === "theme") this.theme();
    else if (action === "help") $("help").showModal();
    else if (action === "back") this.back();
    else this.choose(action);
  }

  async next() {
    try {
      const shown = await json("POST", "/api/next", { json: { tab: tab() } });
      this.count(shown.counts);
      if (shown.pair !== null) return await this.show({ ...shown, version: 1 });
      this.current = null;
      document.body.dataset.ready = "none";
      const back = this.last ? [{ text: "Change the last answer", act: () => this.back() }] : [];
      const again = { text: "Look again", primary: true, act: () => this.next() };
      return message("All done", "There is no pair left for you. Thank you.", [again, ...back]);
    } catch (error) {
      if (error.status !== 422) return this.failed(error, () => this.next());
      toast(error.message, 5000);
      return this.next();
    }
  }

  /** Both pictures at once: neither has the advantage of being seen first. */
  async show(pair) {
    this.current = null;
    $("pictures").classList.add("waiting");
    this.unzoom();
    const load = async (side) => {
      const blob = await (await request("GET", `/api/pairs/${pair.pair}/${side}`)).blob();
      const url = URL.createObjectURL(blob),
        old = $(side).src;
      $(side).src = url;
      if (old.startsWith("blob:")) URL.revokeObjectURL(old);
      await $(side).decode();
      $(side).classList.toggle("small", Math.max($(side).naturalWidth, $(side).naturalHeight) <= 256);
    };
    await Promise.all([load("left"), load("right")]);
    noMessage();
    $("prompt").textContent = pair.prompt;
    for (const choice of ["left", "right", "neither"])
      $(`choose-${choice}`).classList.toggle("chosen", pair.choice === choice);
    $("back").disabled = !this.last || this.last.pair === pair.pair;
    $("pictures").classList.remove("waiting");
    $("stage").focus();
    Object.assign(this, { current: pair, since: performance.now() });
    document.body.dataset.ready = String(pair.pair);
  }

  async choose(choice) {
    const { current } = this;
    if (!current || this.busy) return;
    this.busy = true;
    const ms = Math.round(performance.now() - this.since);
    const answer = { pair: current.pair, choice, version: current.version, ms };
    const key = this.pending(tab());
    localStorage.setItem(key, JSON.stringify(answer));
    Object.assign(this, { last: { ...current, choice }, current: null });
    await this.send(key);
    this.busy = false;
    await this.next();
  }

  /** Where a tab keeps its answer; a closed tab's is sent by the next that is opened. */
  pending(name) {
    return `${PENDING}/${this.me.comparison}/${this.me.name}/${name}`;
  }

  /** Sends the answer that is kept, again and again until it has arrived. */
  async send(key) {
    const kept = localStorage.getItem(key);
    if (!kept) return;
    const { pair, ...answer } = JSON.parse(kept);
    for (;;) {
      try {
        const { counts } = await json("PUT", `/api/pairs/${pair}`, { json: answer });
        this.count(counts);
        document.body.dataset.answered = `${pair} ${answer.choice}`;
      } catch (error) {
        if (error instanceof Offline) {
          $("saved").textContent = "No connection; your answer is kept";
          await new Promise((done) => setTimeout(done, retryAfter(this.attempts++)));
          continue;
        }
        if (error.status === 401) return this.failed(error, () => this.start());
        if (this.last?.pair === pair) this.last.version = error.body?.version ?? this.last.version;
        toast(error.message, 5000);
      }
      this.attempts = 0;
      $("saved").textContent = "";
      if (localStorage.getItem(key) === kept) localStorage.removeItem(key);
      return;
    }
  }

  async back() {
    const { last } = this;
    if (!last || this.busy || this.current?.pair === last.pair) return;
    try {
      await this.show({ ...last, version: last.version + 1 });
    } catch (error) {
      this.failed(error, () => this.next());
    }
  }

  count({ done, left }) {
    $("bar").max = Math.max(done + left, 1);
    $("bar").value = done;
    $("counts").textContent = `${done} of ${done + left}`;
  }

  zoom(event) {
    if (!event.target.closest(".frame")) return;
    if ($("pictures").classList.toggle("zoomed")) this.look(event);
    else this.unzoom();
  }

  unzoom() {
    $("pictures").classList.remove("zoomed");
    for (const side of ["left", "right"]) $(side).style.transform = "";
  }

  /** The same place of both pictures under the pointer, at one to one or three times as large as it was. */
  look(event) {
    const frame = event.target.closest(".frame");
    if (!frame || !$("pictures").classList.contains("zoomed")) return;
    const box = frame.getBoundingClientRect(),
      x = (100 * (event.clientX - box.left)) / box.width,
      y = (100 * (event.clientY - box.top)) / box.height;
    for (const side of ["left", "right"]) {
      const image = $(side),
        fitted = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
      image.style.transformOrigin = `${x}% ${y}%`;
      image.style.transform = `scale(${Math.max(3, 1 / fitted)})`;
    }
  }

  askToken(text) {
    askToken(text, (token) => {
      useToken(token);
      this.start();
    });
  }

  failed(error, again) {
    if (error instanceof ApiError && error.status === 401)
      return this.askToken("This token is not known. Ask for a new link.");
    document.body.dataset.ready = "error";
    const offline = error instanceof Offline;
    const [title, text] = offline
      ? ["No connection", "The server does not answer."]
      : ["That did not work", error.message];
    return message(title, text, [{ text: "Try again", primary: true, act: again }]);
  }
}

export const app = new App();
app.start();

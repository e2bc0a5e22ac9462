// The application: who is there, what is shown, what the keys do.

import * as api from "./api.js";
import { Editor } from "./editor.js";
import { Keeper } from "./keep.js";
import { KEYS, TOOLS, actionOf } from "./keys.js";
import { $, setUpDialogs, setUpTheme, toast } from "./page.js";
import { banner, markdown, tour } from "./panels.js";
import { Review } from "./review.js";
import { Session } from "./session.js";

const SEEN = "diffdoctor-annotate-guidelines";

class App extends Session {
  constructor() {
    super();
    this.editor = new Editor({ onEdit: () => this.edited(), onAssist: (x, y) => this.assist(x, y) });
    this.review = new Review(this);
    this.theme = setUpTheme();
    setUpDialogs(KEYS, () => $("stage"));
    const click = {
      submit: "submit",
      clean: "clean",
      skip: "skip",
      unusable: "unusable",
      back: "back",
      "open-guidelines": "guidelines",
      theme: "theme",
      "open-help": "help",
    };
    for (const [id, action] of Object.entries(click)) $(id).addEventListener("click", () => this.act(action));
    $("mode-label").addEventListener("click", () => this.setMode("label"));
    $("mode-review").addEventListener("click", () => this.setMode("review"));
    $("tour-again").addEventListener("click", () => {
      $("help").close();
      tour(() => $("stage").focus());
    });
    // A button pressed by the pointer gives the keys back to the picture.
    addEventListener("click", (event) => {
      if (
        event.detail &&
        event.target.closest("button") &&
        !document.querySelector("dialog[open]") &&
        $("message").hidden
      )
        $(this.review.active && !this.review.editing ? "tiles" : "stage").focus();
    });
    addEventListener("keydown", (event) => this.key(event));
    addEventListener("keyup", (event) => this.keyUp(event));
    addEventListener("blur", () => this.space(false));
  }

  async start() {
    if (!api.takeToken()) return this.askToken("Open the link that you were given, or paste your token.");
    try {
      this.me = await api.me();
      this.guidelines = await api.guidelines();
    } catch (error) {
      return this.failed(error, () => this.start());
    }
    this.keeper = new Keeper(`${this.me.project}/${this.me.name}`, {
      onState: (state, text) => this.showSaved(state, text),
      onWritable: (yes) => this.setWritable(yes),
      onFree: () => this.next(),
      onLease: (held) =>
        banner(
          "lease",
          held ? null : "Your time for this picture ran out and it went to someone else. What you submit still counts.",
        ),
      onConflict: () => {
        this.showSaved("kept");
        banner("conflict", "This picture was changed on another computer.", [
          { text: "Take that", act: () => this.resolve(false) },
          { text: "Keep mine", act: () => this.resolve(true) },
        ]);
      },
      onExtra: (extra) => this.editor.setTags(extra.tags ?? []),
    });
    $("guidelines-text").replaceChildren(...markdown(this.guidelines.text));
    $("modes").hidden = this.me.role === "annotator";
    this.editor.offerAssist(this.me.assist);
    this.showCounts();
    await this.next();
    if (!localStorage.getItem("diffdoctor-annotate-tour")) tour(() => this.offerGuidelines());
    else this.offerGuidelines();
    return undefined;
  }

  offerGuidelines() {
    $("stage").focus();
    if (!this.guidelines.text.trim() || localStorage.getItem(SEEN) === this.guidelines.hash) return;
    if (localStorage.getItem(SEEN)) toast("The guidelines have changed.", 5000);
    localStorage.setItem(SEEN, this.guidelines.hash);
    $("guidelines").showModal();
  }

  setMode(mode) {
    if ((mode === "review") === this.review.active) return;
    $("mode-label").setAttribute("aria-pressed", String(mode === "label"));
    $("mode-review").setAttribute("aria-pressed", String(mode === "review"));
    if (mode === "review") {
      this.current = null;
      this.keeper.leave();
      this.review.start();
    } else {
      this.review.stop();
      this.next();
    }
  }

  // Keys.

  space(down) {
    const { tools } = this.editor;
    if (tools.spaced === down) return;
    tools.spaced = down;
    tools.spacedUsed = false;
    $("stage").classList.toggle("pan", down);
  }

  key(event) {
    const { target } = event,
      typing = target.matches?.("input:not([type=range]), textarea");
    if (event.defaultPrevented || typing || document.querySelector("dialog[open]")) return;
    if (event.key === "Alt") event.preventDefault(); // or its release opens the browser's menu
    const onButton = target.closest?.("button, input, a, summary");
    if (this.review.active && !this.review.editing) {
      if (!event.repeat && $("message").hidden && !(onButton && event.key === "Enter") && this.review.key(event))
        event.preventDefault();
      return;
    }
    const asked = actionOf(event);
    if (!asked) return;
    const [action, argument] = asked;
    if (onButton && ["submit", "space", "pan"].includes(action)) return; // the control's own keys
    if (action === "nextPart" && onButton) return; // Tab goes round the page; on the picture it goes round the parts
    if (
      event.repeat &&
      !["pan", "smaller", "larger", "undo", "redo", "zoomIn", "zoomOut", "lower", "higher"].includes(action)
    ) {
      if (action === "space") event.preventDefault();
      return;
    }
    if (!$("message").hidden && action !== "back") return;
    if (this.act(action, argument)) event.preventDefault();
  }

  keyUp(event) {
    if (event.key !== " ") return;
    const { tools } = this.editor;
    if (tools.spaced && !tools.spacedUsed) this.editor.togglePart();
    this.space(false);
  }

  /** Does what a key or a button asks; false leaves the key to the browser. */
  act(action, argument) {
    const { editor } = this,
      { view, tools } = editor;
    const acts = {
      submit: () => {
        if (!tools.finish()) this.submit();
      },
      clean: () => {
        if (this.confirmed("clean", "Press C again to call it clean.")) this.submit("clean");
      },
      unusable: () => {
        if (this.confirmed("unusable", "Press U again to call it unusable.")) this.submit("unusable");
      },
      skip: () => this.skip(),
      back: () => {
        if (!tools.unclick()) this.back();
      },
      guidelines: () => $("guidelines").showModal(),
      help: () => $("help").showModal(),
      theme: () => {
        this.theme();
        view.redraw();
      },
      space: () => this.space(true),
      escape: () => {
        if (!tools.abandon()) $("stage").focus();
      },
      nextPart: () => (this.current && editor.model ? editor.nextPart(argument) : false),
      acceptAll: () => editor.decideAll(true),
      refuseAll: () => editor.decideAll(false),
      lower: () => editor.stepThreshold(-5),
      higher: () => editor.stepThreshold(5),
      reset: () => editor.reset(),
      smaller: () => tools.scaleSize(-1),
      larger: () => tools.scaleSize(1),
      undo: () => editor.undo(),
      redo: () => editor.redo(),
      hide: () => editor.hide(),
      flicker: () => editor.flicker(),
      colour: () => editor.nextColour(),
      tag: () => editor.toggleTag(argument),
      one: () => view.zoomTo(1),
      fit: () => view.fit(),
      zoomIn: () => view.zoomTo(view.scale * 1.25),
      zoomOut: () => view.zoomTo(view.scale / 1.25),
      pan: () => view.pan(...argument),
    };
    if (acts[action]) return acts[action]() !== false;
    if (TOOLS[action]) {
      if (!$(`tool-${action}`).disabled) tools.use(action);
      return true;
    }
    return false;
  }
}

export const app = new App();
app.start();

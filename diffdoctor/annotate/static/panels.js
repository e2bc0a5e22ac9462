// Everything around the picture that speaks: messages, banners, help, guidelines, tour. All text goes in as text.

import { $, buttons, make } from "./page.js";

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"),
    use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `/static/icons.svg#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

const banners = new Map();

/** One line above the picture for each `kind`; the last one set is shown. Null takes it away. */
export function banner(kind, text, actions = []) {
  banners.delete(kind);
  if (text) banners.set(kind, { text, actions });
  const last = [...banners.values()].at(-1),
    element = $("banner");
  element.hidden = !last;
  if (!last) return;
  element.querySelector("span").textContent = last.text;
  element.querySelector(".actions").replaceChildren(...buttons(last.actions));
}

/** Asks for one of `reasons`; its number chooses it, Enter the first. */
export function askReason(reasons, chosen) {
  const dialog = $("reasons");
  const choose = (reason) => {
    dialog.close();
    chosen(reason);
  };
  $("reason-list").replaceChildren(
    ...reasons.map((reason, index) =>
      make(
        "button",
        { type: "button", onclick: () => choose(reason) },
        reason,
        make("kbd", { textContent: String(index + 1) }),
      ),
    ),
  );
  dialog.onkeydown = (event) => {
    if (reasons[Number(event.key) - 1]) {
      event.preventDefault();
      choose(reasons[Number(event.key) - 1]);
    }
  };
  dialog.showModal();
  $("reason-list").firstChild.focus();
}

/** Headings, lists, quotes, code, bold and emphasis of Markdown, as elements; anything else, HTML too, is text. */
export function markdown(text) {
  const blocks = [];
  let open = null,
    fence = null; // the paragraph or list that the next line may go on
  const add = (block) => {
    blocks.push(block);
    return block;
  };
  for (const line of text.split(/\r?\n/)) {
    if (/^```/.test(line)) {
      fence = fence ? null : add(make("pre"));
      open = null;
      continue;
    }
    if (fence) {
      fence.append(`${line}\n`);
      continue;
    }
    const heading = /^(#{1,4})\s+(.*)/.exec(line),
      item = /^\s*(?:([-*+])|\d+[.)])\s+(.*)/.exec(line);
    if (heading) {
      add(make(`h${Math.min(3, heading[1].length)}`, {}, ...inline(heading[2])));
      open = null;
    } else if (item) {
      const tag = item[1] ? "ul" : "ol";
      if (open?.localName !== tag) open = add(make(tag));
      open.append(make("li", {}, ...inline(item[2])));
    } else if (!line.trim()) open = null;
    else if (open) (open.localName === "p" ? open : open.lastChild).append(" ", ...inline(line.trim()));
    else open = add(make("p", {}, ...inline(line.trim())));
  }
  return blocks;
}

function inline(text) {
  return text
    .split(/(\*\*[^*]+\*\*|`[^`]+`|\*[^*\s][^*]*\*)/)
    .filter(Boolean)
    .map((piece) => {
      if (/^\*\*.+\*\*$/.test(piece)) return make("strong", { textContent: piece.slice(2, -2) });
      if (/^`.+`$/.test(piece)) return make("code", { textContent: piece.slice(1, -1) });
      if (/^\*.+\*$/.test(piece)) return make("em", { textContent: piece.slice(1, -1) });
      return piece;
    });
}

const STEPS = [
  [
    "stage",
    "The picture",
    "Damage that the detector suspects is already marked. Accept the proposal with Enter, or mend it first.",
  ],
  [
    "proposal",
    "The proposal",
    "Click a part with the lasso or the pointer to refuse it, once more to accept it. The slider marks more or less; what you drew stays.",
  ],
  [
    "toolbar",
    "Drawing",
    "Circle missed damage roughly with the lasso: no need to be exact. Hold Alt to remove. The wheel zooms at the pointer, Space and drag moves.",
  ],
  [
    "submit",
    "Deciding",
    "Enter submits what is marked and goes on, C says that nothing is damaged. Backspace goes back to the last picture. Press ? for all keys.",
  ],
];

/** The short tour; `done` is called at its end. */
export function tour(done) {
  let step = 0;
  const show = () => {
    document.querySelector(".pointed")?.classList.remove("pointed");
    if (step >= STEPS.length) {
      $("coach").hidden = true;
      localStorage.setItem("diffdoctor-annotate-tour", "done");
      return done();
    }
    const [target, title, text] = STEPS[step];
    $(target).classList.add("pointed");
    $("coach").querySelector("h2").textContent = title;
    $("coach").querySelector("p").textContent = text;
    $("coach").querySelector(".dots").textContent = STEPS.map((_, index) => (index === step ? "●" : "○")).join("");
    $("tour-next").textContent = step + 1 < STEPS.length ? "Next" : "Start";
    $("coach").hidden = false;
    $("tour-next").focus();
    return undefined;
  };
  $("tour-next").onclick = () => {
    step++;
    show();
  };
  $("tour-skip").onclick = () => {
    step = STEPS.length;
    show();
  };
  show();
}

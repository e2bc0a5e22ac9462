// Every tool and every key, once: what it does, and how it is listed. Letters are taken by what they write, so other
// layouts work.

export const KEYS = [
  [
    "Picture",
    [
      ["submit", "Enter", "Submit what is marked, next picture"],
      ["clean", "C", "Clean: nothing is damaged, next picture"],
      ["skip", "S", "Skip, with a reason"],
      ["unusable", "U", "Unusable as a picture"],
      ["back", "Backspace", "Back to the previous picture"],
      ["guidelines", "F", "Guidelines"],
    ],
  ],
  [
    "Proposal",
    [
      ["nextPart", "Tab", "Next part (Shift: the one before)"],
      ["togglePart", "Space", "Accept or refuse that part"],
      ["acceptAll", "A", "Accept every part"],
      ["refuseAll", "R", "Refuse every part"],
      ["lower", ",", "Lower threshold: more is marked"],
      ["higher", ".", "Higher threshold: less is marked"],
      ["reset", "X", "Back to the proposal as it came"],
    ],
  ],
  [
    "Other",
    [
      ["undo", "Z", "Undo"],
      ["redo", "Shift+Z", "Redo"],
      ["tag1", "Shift+1…4", "Tags for damage you cannot mark"],
      ["theme", "T", "Light or dark"],
      ["help", "?", "These keys"],
    ],
  ],
  [
    "Tools",
    [
      ["select", "V", "Accept or refuse parts by a click"],
      ["lasso", "L", "Lasso: add"],
      ["unlasso", "Shift+L", "Lasso: remove"],
      ["brush", "B", "Brush"],
      ["eraser", "E", "Eraser"],
      ["polygon", "P", "Polygon"],
      ["grow", "G", "Grow from a point"],
      ["disc", "D", "Disc"],
      ["assist", "Q", "A program marks what is clicked on, where there is one"],
      ["ignore", "I", "Ignore here: cannot be decided"],
      ["smaller", "[", "Smaller"],
      ["larger", "]", "Larger"],
      ["", "Alt", "Held: remove instead of add (or the right button)"],
      ["", "Shift", "Held with a brush: a straight line"],
      ["", "Esc", "Give up what is being drawn"],
    ],
  ],
  [
    "Look",
    [
      ["hide", "H", "Hide the mask"],
      ["flicker", "M", "Flicker between picture and mask"],
      ["colour", "K", "Another colour of the mask"],
      ["one", "1", "One to one"],
      ["fit", "0", "Whole picture"],
      ["zoomIn", "+", "Zoom in (or the wheel, at the pointer)"],
      ["zoomOut", "-", "Zoom out"],
      ["", "Space + drag", "Move the picture (or the middle button)"],
      ["", "Arrows", "Move the picture"],
    ],
  ],
  [
    "Review",
    [
      ["", "1…9", "Choose a mask"],
      ["", "Enter", "Accept the chosen mask"],
      ["", "J, N, O", "Merge: majority, union, overlap"],
      ["", "E", "Edit the chosen mask"],
      ["", "C, U", "Clean, unusable"],
      ["", "X", "Nobody was right: ask one more person"],
    ],
  ],
];

export const TOOLS = {
  select: {
    key: "V",
    name: "Select",
    hint: "Click a marked part to refuse it, again to accept it. Tab and Space do the same.",
  },
  lasso: {
    key: "L",
    name: "Lasso",
    hint: "Drag roughly around damage; the outline closes itself. Hold Alt to remove.",
  },
  unlasso: { key: "⇧L", name: "Lasso off", hint: "Drag around what is not damage to remove it. Hold Alt to add." },
  brush: { key: "B", name: "Brush", hint: "Paint. [ and ] change the size, Shift draws a straight line, Alt erases." },
  eraser: {
    key: "E",
    name: "Eraser",
    hint: "Erase. [ and ] change the size, Shift draws a straight line, Alt paints.",
  },
  polygon: {
    key: "P",
    name: "Polygon",
    hint: "Click corners. Enter or the first corner closes, Backspace takes one back, Esc gives up.",
  },
  grow: { key: "G", name: "Grow", hint: "Press on damage and drag sideways: alike pixels join. Alt removes them." },
  disc: { key: "D", name: "Disc", hint: "Click to mark a disc. [ and ] change its size." },
  assist: { key: "Q", name: "Assist", hint: "Click on damage: a program marks what belongs to it. Alt removes that." },
  ignore: {
    key: "I",
    name: "Ignore",
    hint: "Drag around what you cannot decide: it will not count. Alt takes it back.",
  },
};

const ARROWS = { ArrowLeft: [64, 0], ArrowRight: [-64, 0], ArrowUp: [0, 64], ArrowDown: [0, -64] };
const NAMED = { "+": "zoomIn", "=": "zoomIn", "-": "zoomOut", "{": "smaller", "}": "larger", "?": "help" };
const byKey = new Map(
  KEYS.flatMap(([, keys]) => keys.filter(([action]) => action).map(([action, key]) => [key.toLowerCase(), action])),
);

/** The action that a key event asks for, as [name, argument], or null. */
export function actionOf(event) {
  const { key, shiftKey } = event,
    command = event.ctrlKey || event.metaKey;
  if (command) {
    const letter = key.toLowerCase();
    if (letter === "z") return [shiftKey ? "redo" : "undo"];
    return letter === "y" ? ["redo"] : null;
  }
  if (ARROWS[key]) return ["pan", ARROWS[key]];
  if (key === "Tab") return ["nextPart", shiftKey ? -1 : 1];
  if (key === " ") return ["space"];
  if (key === "Escape") return ["escape"];
  const digit = /^Digit([1-9])$/.exec(event.code)?.[1];
  if (digit && shiftKey) return ["tag", Number(digit) - 1];
  if (digit && digit !== "1") return ["digit", Number(digit)];
  if (NAMED[key]) return [NAMED[key]];
  if (key.length === 1 && shiftKey && key.toLowerCase() !== key) {
    const shifted = byKey.get(`shift+${key.toLowerCase()}`);
    if (shifted) return [shifted];
  }
  const action = byKey.get(key.toLowerCase());
  return action ? [action] : null;
}

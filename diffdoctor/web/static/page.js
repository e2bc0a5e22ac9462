// What every page has: elements by name, messages, dialogs, light or dark. All text goes in as text.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function buttons(actions) {
  return actions.map(({ text, key, primary, act }) =>
    make(
      "button",
      { type: "button", className: primary ? "primary" : "", onclick: act },
      text,
      key ? make("kbd", { textContent: key }) : null,
    ),
  );
}

/** Covers the page: the end of the queue, an error, a pause. */
export function message(title, text, actions = [], extra = null) {
  const [heading, paragraph, row] = $("message").querySelectorAll("h1, p, .actions");
  heading.textContent = title;
  paragraph.textContent = text;
  row.replaceChildren(...(extra ? [extra] : []), ...buttons(actions));
  $("message").hidden = false;
  row.querySelector("input, button")?.focus();
}

export function noMessage() {
  $("message").hidden = true;
}

/** Asks who is there, and gives the token to `take`. */
export function askToken(text, take) {
  const input = make("input", { type: "password", placeholder: "Token", autocomplete: "off" });
  const go = () => {
    const token = input.value.trim();
    if (!token) return;
    noMessage();
    take(token);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go();
  });
  document.body.dataset.ready = "error";
  message("Who are you?", text, [{ text: "Go", primary: true, act: go }], input);
}

let fading;
export function toast(text, ms = 2600) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => {
    $("toast").hidden = true;
  }, ms);
}

/** Dialogs close by a click beside them; `keys`, [[group, [[, key, text]]]], fills the help; `back` gets the focus. */
export function setUpDialogs(keys, back) {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    });
    dialog.addEventListener("close", () => back().focus());
  }
  $("keys").replaceChildren(
    ...keys.map(([group, keys]) =>
      make(
        "section",
        {},
        make("h2", { textContent: group }),
        make(
          "dl",
          {},
          ...keys.flatMap(([, key, text]) => [
            make("dt", {}, make("kbd", { textContent: key })),
            make("dd", { textContent: text }),
          ]),
        ),
      ),
    ),
  );
}

export function setUpTheme() {
  const key = "diffdoctor-theme",
    dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = localStorage.getItem(key) ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  apply();
  return () => {
    localStorage.setItem(key, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
    dispatchEvent(new Event("resize"));
  };
}

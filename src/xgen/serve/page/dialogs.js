/** The dialogs: the browser's own, which keep the focus inside and close with Escape. */

import { byId, listen, plural } from "./dom.js";

/** Shows a dialog; resolves when it is closed, to what it was closed with, "" where it was dismissed. */
function shown(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Asks for the key; null when the user would rather not. `wrong`: the one before was refused. */
export async function askKey(wrong) {
  const dialog = byId("key-dialog");
  byId("key-said").textContent = wrong ? "The key was refused. Please check it." : "";
  byId("key").value = "";
  const answer = await shown(dialog);
  const key = byId("key").value.trim();
  byId("key").value = "";
  return answer === "given" ? key : null;
}

export async function confirmed(question) {
  byId("confirm-title").textContent = question;
  const answer = shown(byId("confirm-dialog"));
  // The harmless answer is the one that a stray Enter gives.
  byId("confirm-no").focus();
  return (await answer) === "yes";
}

/** Shows a document; true when the user wants its text in the message instead. */
export async function preview({ name, text, tokens }, mayInsert) {
  byId("preview-title").textContent = name;
  const counted = tokens === null ? "" : `, ${plural(tokens, "token")}`;
  byId("preview-said").textContent = plural(text.length, "character") + counted;
  byId("preview-text").textContent = text;
  byId("preview-insert").hidden = !mayInsert;
  const answer = shown(byId("preview-dialog"));
  byId("preview-close").focus();
  const inserted = (await answer) === "insert";
  byId("preview-text").textContent = "";
  return inserted;
}

export const showShortcuts = () => shown(byId("shortcuts-dialog"));

export function prepareDialogs() {
  const closes = [
    ["key-cancel", "key-dialog", ""],
    ["confirm-no", "confirm-dialog", ""],
    ["confirm-yes", "confirm-dialog", "yes"],
    ["preview-insert", "preview-dialog", "insert"],
    ["preview-close", "preview-dialog", ""],
    ["shortcuts-close", "shortcuts-dialog", ""],
  ];
  for (const [button, dialog, value] of closes) {
    listen(byId(button), { click: () => byId(dialog).close(value) });
  }
  listen(byId("key-form"), {
    submit: (event) => {
      event.preventDefault();
      if (byId("key").value.trim()) byId("key-dialog").close("given");
    },
  });
}

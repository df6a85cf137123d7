/** Settings, the prompt for a key, and lines that go by themselves. */

import { h } from "./dom.js";

const TOAST_MS = 8000;

/** What the user sets, or null if it is left: the settings, and the key. */
export async function askSettings(settings, key, exportAll) {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");
  for (const [name, value] of Object.entries({ ...settings, key: key ?? "" })) form.elements[name].value = value;
  dialog.querySelector("#export-all").onclick = exportAll;
  if ((await closed(dialog)) !== "save") return null;
  const given = Object.fromEntries(new FormData(form));
  const { key: newKey, ...rest } = given;
  return { settings: rest, key: newKey.trim() };
}

/** The key that the server needs; "" if the dialog is left. */
export async function askKey() {
  const dialog = document.getElementById("key");
  const input = dialog.querySelector("input");
  input.value = "";
  return (await closed(dialog)) === "save" ? input.value.trim() : "";
}

function closed(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** A line for a few seconds, with a button that takes back what it tells. */
export function toast(text, undo) {
  const element = document.getElementById("toast");
  const hide = () => {
    element.hidden = true;
  };
  const button = h("button", { type: "button", class: "plain", onclick: () => (hide(), undo()) }, "Undo");
  element.replaceChildren(text, button);
  element.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(hide, TOAST_MS);
}

// Keys: what they are, and what is done when one is pressed.

import { byId, h, replace } from "./dom";

const KEYS = [
  ["g o", "overview"],
  ["g r", "rollouts"],
  ["g w", "world model"],
  ["/", "search"],
  ["j  k", "next, previous"],
  ["Enter", "open"],
  ["u", "up: from a rollout to the table"],
  ["[  ]", "previous, next rollout of the table"],
  ["←  →", "previous, next of the same task"],
  ["s", "siblings side by side"],
  ["t", "every token with its numbers"],
  ["b", "before and after, side by side"],
  ["x", "save as a case"],
  ["m", "the chat template too"],
  ["r", "raw output"],
  ["c", "copy as JSON"],
  ["a", "arms in place of runs"],
  ["l", "log axis"],
  ["d", "dark or light"],
  ["?", "these keys"],
];

export function showKeys(): void {
  const dialog = byId("keys") as HTMLDialogElement;
  if (dialog.open) return dialog.close();
  const rows = KEYS.map(([keys, meaning]) => {
    const shown = keys.split("  ").map((key) => h("kbd", {}, key));
    return [h("dt", {}, shown), h("dd", {}, meaning)];
  });
  const close = h("form", { method: "dialog" }, h("button", {}, "Close"));
  replace(dialog, h("h2", {}, "Keys"), h("dl", {}, rows), close);
  dialog.showModal();
}

// Do what `find` returns for a key, or for g and a key after it.
export function onKeys(find: (key: string) => (() => unknown) | undefined): void {
  let before = "";
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = (event.target as Element).closest<HTMLElement>("input:not([type=checkbox]), select, textarea");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    const act = find(before === "g" ? `g ${event.key}` : event.key);
    before = event.key;
    if (!act) return;
    event.preventDefault();
    act();
  });
}

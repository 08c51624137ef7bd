// Put the page together: what is shown at which address, the list of runs, keys, and looking for what is new.

import { ask } from "./api.js";
import { announce, h, number, replace } from "./dom.js";
import { isFrozen, written } from "./frozen.js";
import { group } from "./group.js";
import { overview } from "./overview.js";
import { rollout } from "./rollout.js";
import { rollouts } from "./rollouts.js";
import { change, link, read } from "./state.js";
import { world } from "./world.js";

const PAGES = { overview, rollouts, world, rollout, group };
const POLL_MS = 4000;
const main = document.getElementById("main");

const context = { sources: [], roles: [], colours: new Map(), dashes: new Map() };
let shown = { keys: {}, refresh: null, close: null };
let stamp = "";

// ---------------------------------------------------------------- runs and files

export const selected = (params) => {
  const named = params.getAll("runs").filter((name) => context.colours.has(name));
  return named.length ? named : context.sources.map((source) => source.name);
};
context.selected = selected;

function sidebar() {
  const { page, params } = read();
  const chosen = new Set(selected(params));
  const toggle = (name, only) => () => {
    const next = only ? [name] : context.sources.map((s) => s.name).filter((n) => (n === name ? !chosen.has(n) : chosen.has(n)));
    const all = next.length === context.sources.length || !next.length;
    if (page === "rollout" || page === "group") location.hash = link("rollouts", { runs: all ? [] : next });
    else change({ runs: all ? [] : next }, { push: true });
  };
  const rows = context.sources.map((source) =>
    h("li", { class: `source${chosen.has(source.name) ? "" : " off"}` },
      h("label", { title: "Show it or not" },
        h("input", { type: "checkbox", checked: chosen.has(source.name), onchange: toggle(source.name, false) }),
        h("span", { class: "swatch", style: { background: context.colours.get(source.name) } })),
      h("button", { class: "name", title: `Only ${source.name}`, onclick: toggle(source.name, true) },
        h("span", { class: "source-name" }, source.name),
        h("span", { class: "source-facts" }, facts(source)))));
  const head = h("h2", {}, "Runs and files", chosen.size < context.sources.length && !["rollout", "group"].includes(page) ? h("button", { class: "linkish", onclick: () => change({ runs: [] }, { push: true }) }, "all") : null);
  replace(document.querySelector(".side"), head, h("ul", { class: "sources" }, rows));
}

function facts(source) {
  if (source.problem) return source.problem;
  if (source.kind === "file") return source.refused ? `file · ${source.refused} refused` : "file";
  const state = source.state === "running" ? [h("span", { class: "pulse", "aria-hidden": "true" }), "running · "] : source.state === "stopped" ? "stopped · " : "";
  return [state, `${source.done} of ${source.steps} steps`];
}

function head() {
  const { page, params } = read();
  const runs = params.getAll("runs");
  const tab = (name, title) =>
    h("a", { href: link(name, { runs }), "aria-current": page === name || (name === "rollouts" && ["rollout", "group"].includes(page)) ? "page" : null }, title);
  const hasRuns = context.sources.some((source) => source.kind === "run");
  replace(document.querySelector(".tabs"), hasRuns ? tab("overview", "Overview") : null, tab("rollouts", "Rollouts"), tab("world", "World model"));
  const running = context.sources.filter((source) => source.state === "running");
  replace(document.querySelector(".live"), isFrozen ? `as of ${written}` : running.length
    ? [h("span", { class: "pulse", "aria-hidden": "true" }), running.length === 1 ? `step ${number(running[0].done)} of ${number(running[0].steps)}` : `${running.length} runs going`]
    : []);
}

const PALETTE = 8; // --line-0 to --line-7

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];

// An arm has one colour, and its seeds differ by their dashes; all else has a colour of its own.
function paint() {
  const style = getComputedStyle(document.documentElement);
  const kinds = [...new Set(context.sources.map((source) => source.arm || source.name))];
  const seeds = new Map();
  context.colours.clear();
  for (const source of context.sources) {
    const kind = source.arm || source.name;
    const nth = seeds.get(kind) || 0;
    seeds.set(kind, nth + 1);
    context.colours.set(source.name, style.getPropertyValue(`--line-${kinds.indexOf(kind) % PALETTE}`).trim());
    context.dashes.set(source.name, DASHES[nth % DASHES.length]);
  }
}

// ---------------------------------------------------------------- pages

async function show() {
  const { page, params } = read();
  if (!(page in PAGES)) {
    const first = context.sources.some((source) => source.kind === "run") ? "overview" : "rollouts";
    history.replaceState(null, "", link(first));
    return show();
  }
  shown.close?.();
  shown = { keys: {}, refresh: null, close: null };
  document.documentElement.dataset.page = page;
  head();
  sidebar();
  if (!context.sources.length) return nothing();
  try {
    const made = await PAGES[page](main, params, context);
    if (read().page === page) shown = { keys: {}, ...made };
    else made?.close?.();
  } catch (error) {
    failed(error);
  }
}

function nothing() {
  replace(main, h("div", { class: "empty" }, h("h1", {}, "Nothing to show yet"), h("p", {}, "There is no run and no file of trajectories in what was given. New runs appear here by themselves.")));
  shown = { keys: {}, refresh: show };
}

function failed(error) {
  replace(main, h("div", { class: "empty" }, h("h1", {}, "This cannot be shown"), h("p", {}, error.message)));
}

async function look() {
  try {
    const found = await ask("sources");
    document.body.classList.remove("lost");
    const now = JSON.stringify(found);
    if (now === stamp) return false;
    stamp = now;
    context.sources = found.sources;
    context.roles = found.roles;
    paint();
    return true;
  } catch {
    if (!document.body.classList.contains("lost")) announce("The server does not answer; is `backtalk view` still running?");
    document.body.classList.add("lost");
    return false;
  }
}

async function poll() {
  if (!document.hidden && (await look())) {
    head();
    sidebar();
    await shown.refresh?.();
  }
  setTimeout(poll, POLL_MS);
}

// ---------------------------------------------------------------- keys and theme

const KEYS = [
  ["g o", "overview"], ["g r", "rollouts"], ["g w", "world model"], ["/", "search"], ["j  k", "next, previous"], ["Enter", "open"], ["u", "up: from a rollout to the table"],
  ["[  ]", "previous, next rollout of the table"], ["←  →", "previous, next of the same task"], ["s", "siblings side by side"],
  ["t", "every token with its numbers"], ["b", "before and after, side by side"], ["x", "save as a case"], ["m", "the chat template too"], ["r", "raw output"], ["c", "copy as JSON"], ["a", "arms in place of runs"], ["l", "log axis"], ["d", "dark or light"], ["?", "these keys"],
];
let before = "";

function onkey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input:not([type=checkbox]), select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const key = before === "g" ? `g ${event.key}` : event.key;
  before = event.key;
  const general = {
    "g o": () => (location.hash = link("overview", { runs: read().params.getAll("runs") })),
    "g r": () => (location.hash = link("rollouts", { runs: read().params.getAll("runs") })),
    "g w": () => (location.hash = link("world", { runs: read().params.getAll("runs") })),
    "?": keys, d: theme,
  };
  const act = shown.keys[key] || general[key];
  if (act) {
    event.preventDefault();
    act(event);
  }
}

function keys() {
  const dialog = document.getElementById("keys");
  if (dialog.open) return dialog.close();
  replace(dialog, h("h2", {}, "Keys"), h("dl", {}, KEYS.map(([key, meaning]) => [h("dt", {}, key.split("  ").map((k) => h("kbd", {}, k))), h("dd", {}, meaning)])), h("form", { method: "dialog" }, h("button", {}, "Close")));
  dialog.showModal();
}

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* private windows have none */ }
  paint();
  show();
}

try { const kept = localStorage.getItem("theme"); if (kept) document.documentElement.dataset.theme = kept; } catch { /* as above */ }
document.getElementById("keys-button").addEventListener("click", keys);
document.getElementById("theme-button").addEventListener("click", theme);
document.addEventListener("keydown", onkey);
window.addEventListener("hashchange", show);
await look();
await show();
if (!isFrozen) setTimeout(poll, POLL_MS);

// Put the page together: what is shown at which address, the list of runs, and looking for what is new.

import type { Source } from "./answers";
import { ask } from "./api";
import { announce, byId, type Child, colour, h, number, replace, swatch } from "./dom";
import { isFrozen, written } from "./frozen";
import { group } from "./group";
import { onKeys, showKeys } from "./keys";
import { overview } from "./overview";
import { rollout } from "./rollout";
import { rollouts } from "./rollouts";
import { change, type Context, go, link, type Page, read, type Show } from "./state";
import { world } from "./world";

const PAGES: Record<string, Show> = { overview, rollouts, world, rollout, group };
const POLL_MS = 4000;
const PALETTE = 8; // --line-0 to --line-7
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];

const main = byId("main");
const context: Context = {
  sources: [],
  colours: new Map(),
  dashes: new Map(),
  selected(params) {
    const named = params.getAll("runs").filter((name) => context.colours.has(name));
    return named.length ? named : context.sources.map(({ name }) => name);
  },
  asked() {
    const names = context.selected(read().params);
    return names.length === context.sources.length ? "" : names.join("\n");
  },
};
let shown: Page = { keys: {} };
let stamp = "";

// ---------------------------------------------------------------- runs and files

const isOneRollout = (page: string) => page === "rollout" || page === "group";
const find = (selector: string) => document.querySelector(selector)!;

function sidebar(): void {
  const { page, params } = read();
  const chosen = new Set(context.selected(params));
  const choose = (names: string[]) => {
    const runs = names.length === context.sources.length ? [] : names;
    if (isOneRollout(page)) go("rollouts", { runs });
    else change({ runs }, { push: true });
  };
  const all = context.sources.map(({ name }) => name);
  const toggled = (name: string) => all.filter((other) => (other === name) !== chosen.has(other));
  const row = (source: Source) => {
    const { name } = source;
    const props = { type: "checkbox", checked: chosen.has(name), onchange: () => choose(toggled(name)) };
    const facts = [h("span", { class: "source-name" }, name), h("span", { class: "source-facts" }, factsOf(source))];
    return h(
      "li",
      { class: `source${chosen.has(name) ? "" : " off"}` },
      h(
        "label",
        { title: "Show it or not" },
        h("input", { ...props, "aria-label": `Show ${name}` }),
        swatch(context.colours.get(name)!),
      ),
      h("button", { class: "name", title: `Only ${name}`, onclick: () => choose([name]) }, facts),
    );
  };
  const isPart = chosen.size < all.length && !isOneRollout(page);
  const reset = isPart ? h("button", { class: "linkish", onclick: () => choose(all) }, "all") : null;
  const title = h("h2", {}, "Runs and files", reset);
  replace(find(".side"), title, h("ul", { class: "sources" }, context.sources.map(row)));
}

function factsOf(source: Source): Child {
  if (source.problem) return source.problem;
  if (source.kind === "file") return source.refused ? `file · ${source.refused} refused` : "file";
  const steps = `${source.done} of ${source.steps} steps`;
  if (source.state === "running") return [pulse(), `running · ${steps}`];
  return source.state === "stopped" ? `stopped · ${steps}` : steps;
}

const pulse = () => h("span", { class: "pulse", "aria-hidden": "true" });

async function head(): Promise<void> {
  const { page, params } = read();
  const runs = params.getAll("runs");
  const tab = (name: string, title: string) => {
    const isCurrent = page === name || (name === "rollouts" && isOneRollout(page));
    return h("a", { href: link(name, { runs }), "aria-current": isCurrent ? "page" : null }, title);
  };
  const hasRuns = context.sources.some(({ kind }) => kind === "run");
  const tabs = [hasRuns ? tab("overview", "Overview") : null, tab("rollouts", "Rollouts"), tab("world", "World model")];
  replace(find(".tabs"), tabs);
  replace(find(".live"), isFrozen ? `as of ${await written()}` : going());
}

function going(): Child {
  const running = context.sources.filter(({ state }) => state === "running");
  if (!running.length) return null;
  const [{ done, steps }] = running;
  const text = running.length === 1 ? `step ${number(done)} of ${number(steps)}` : `${running.length} runs going`;
  return [pulse(), text];
}

// An arm has one colour, and its seeds differ by their dashes; all else has a colour of its own.
function paint(): void {
  const kindOf = ({ arm, name }: Source) => arm || name;
  const kinds = [...new Set(context.sources.map(kindOf))];
  const seeds = new Map<string, number>();
  context.colours.clear();
  for (const source of context.sources) {
    const kind = kindOf(source);
    const nth = seeds.get(kind) || 0;
    seeds.set(kind, nth + 1);
    context.colours.set(source.name, colour(`--line-${kinds.indexOf(kind) % PALETTE}`));
    context.dashes.set(source.name, DASHES[nth % DASHES.length]);
  }
}

// ---------------------------------------------------------------- pages

let asked = 0;
let drawn = Promise.resolve();

// Show what the address says. A page is drawn whole before the next one is, and those in between are left out.
function show(): Promise<void> {
  const mine = ++asked;
  drawn = drawn.then(() => (mine === asked ? draw() : undefined));
  return drawn;
}

async function draw(): Promise<void> {
  if (!(read().page in PAGES)) {
    const hasRuns = context.sources.some(({ kind }) => kind === "run");
    history.replaceState(null, "", link(hasRuns ? "overview" : "rollouts"));
  }
  const { page, params } = read();
  shown.close?.();
  shown = { keys: {} };
  document.documentElement.dataset.page = page;
  head();
  sidebar();
  if (!context.sources.length) {
    shown = { keys: {}, refresh: show };
    const about = "There is no run and no file of trajectories in what was given. New runs appear here by themselves.";
    return empty("Nothing to show yet", about);
  }
  try {
    shown = await PAGES[page](main, params, context);
  } catch (error) {
    empty("This cannot be shown", (error as Error).message);
  }
}

function empty(title: string, about: string): void {
  replace(main, h("div", { class: "empty" }, h("h1", {}, title), h("p", {}, about)));
}

// Ask what there is; return whether that is something new.
async function look(): Promise<boolean> {
  try {
    const found = await ask("sources");
    document.body.classList.remove("lost");
    const now = JSON.stringify(found);
    if (now === stamp) return false;
    stamp = now;
    context.sources = found.sources;
    paint();
    return true;
  } catch {
    const { classList } = document.body;
    if (!classList.contains("lost")) announce("The server does not answer; is `backtalk view` still running?");
    classList.add("lost");
    return false;
  }
}

async function poll(): Promise<void> {
  if (!document.hidden && (await look())) {
    head();
    sidebar();
    await shown.refresh?.();
  }
  setTimeout(poll, POLL_MS);
}

// ---------------------------------------------------------------- dark and light

function theme(): void {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    announce("The browser does not keep this choice");
  }
  paint();
  show();
}

try {
  const kept = localStorage.getItem("theme");
  if (kept) document.documentElement.dataset.theme = kept;
} catch {
  // Private windows have no storage, and nothing was kept.
}

const to = (page: string) => () => go(page, { runs: read().params.getAll("runs") });
const general = { "g o": to("overview"), "g r": to("rollouts"), "g w": to("world"), "?": showKeys, d: theme };
onKeys((key) => shown.keys[key] || general[key as keyof typeof general]);
byId("keys-button").addEventListener("click", showKeys);
byId("theme-button").addEventListener("click", theme);
window.addEventListener("hashchange", show);
await look();
await show();
if (!isFrozen) setTimeout(poll, POLL_MS);

// What stands above and beside a rollout: facts, its siblings, who made the tokens, the audit, what surprised most.

import type { Rollout, Row, Surprise } from "./answers";
import { NAMES } from "./conversation";
import { type Child, h, number, percent, plural, quoted, replace, select, signed, visible } from "./dom";
import { link, read } from "./state";

export type Jump = (position: number) => void;

const card = (title: string, ...children: Child[]) => h("section", { class: "card" }, h("h2", {}, title), children);
const note = (text: string, className = "note") => h("p", { class: className }, text);
export const fact = (name: string, value: Child, className = "") => {
  return h("div", { class: `fact ${className}`.trim() }, h("dt", {}, name), h("dd", {}, value));
};

export const groupLink = ({ run, part, group }: Rollout) => link("group", { run, part, group });

export function back(): string {
  try {
    return sessionStorage.getItem("table") || link("rollouts");
  } catch {
    return link("rollouts"); // the browser keeps no storage for this page
  }
}

export function heading(data: Rollout): HTMLElement {
  const places = { train: `training step ${data.step}`, eval: `evaluation before step ${data.step}`, file: "file" };
  const advantage = advantageOf(data);
  return h(
    "header",
    { class: "rollout-head" },
    h(
      "p",
      { class: "crumbs" },
      h("a", { href: back() }, "Rollouts"),
      ` / ${data.run} / ${places[data.kind]} / `,
      h("a", { href: groupLink(data) }, `group ${data.group}`),
      ` / sample ${data.sample}`,
    ),
    h("h1", {}, visible(data.task)),
    h(
      "dl",
      { class: "facts-row" },
      fact("reward", number(data.reward), data.reward !== null && data.reward > 0 ? "good" : ""),
      advantage && fact("advantage", advantage),
      fact("ended", data.stop.replace("_", " "), data.failure ? "bad" : ""),
      fact("turns", number(data.turns)),
      fact("tokens", number(data.tokens)),
      data.branches > 1 && fact("branches", number(data.branches)),
      data.kind !== "file" && fact("policy version", number(data.version)),
    ),
  );
}

function advantageOf(data: Rollout): string | null {
  if (!data.trained) return data.kind === "train" ? "not trained (yet)" : null;
  return data.advantage === null ? "outside the policy term" : signed(data.advantage);
}

export function siblings(data: Rollout): Child {
  if (data.siblings.length < 2) return null;
  const most = Math.max(...data.siblings.map(({ reward }) => Math.abs(reward ?? 0)), 1e-9);
  const one = (row: Row) => {
    const classes = ["sibling", row.row === data.row && "here", row.stop === "failed" && "failed"];
    const height = `${row.reward === null ? 0 : Math.max(6, (100 * Math.abs(row.reward)) / most)}%`;
    const props = {
      class: classes.filter(Boolean).join(" "),
      href: link("rollout", { ...Object.fromEntries(read().params), row: row.row, pos: null }),
      "aria-current": row.row === data.row ? "true" : null,
      title: `sample ${row.sample}, reward ${number(row.reward)}, advantage ${signed(row.advantage)}, ${row.stop}`,
    };
    const bar = h("span", { class: "sibling-bar" }, h("span", { style: { height } }));
    return h("a", props, bar, row.stop === "failed" ? "✕" : number(row.reward, 2));
  };
  const beside = h("a", { class: "side-by-side", href: groupLink(data) }, "side by side");
  return h("nav", { class: "siblings", "aria-label": "Rollouts of the same task" }, data.siblings.map(one), beside);
}

export function legend(data: Rollout): HTMLElement {
  const weight = (sum: number | undefined, tokens: number | undefined) => {
    return h("td", { title: tokens ? `on ${tokens} tokens` : null }, tokens ? signed(sum, 2) : "–");
  };
  const rows = data.roles.map(({ role, tokens, policy_sum, policy_tokens, world_sum, world_tokens }) => {
    const name = [h("span", { class: `role role-${role}` }, role), h("span", { class: "meaning" }, NAMES[role])];
    const cells = [h("td", {}, number(tokens)), weight(policy_sum, policy_tokens), weight(world_sum, world_tokens)];
    return h("tr", {}, h("th", { scope: "row" }, name), cells);
  });
  const head = (text: string, title: string | null = null) => h("th", { scope: "col", title }, text);
  const heads = [
    head("role"),
    head("tokens"),
    head("policy", "sum of the weights in the policy term; positive: training makes them likelier"),
    head("world", "sum of the weights in the world-model term"),
  ];
  const about = data.trained
    ? "Sums of the weights in the loss, as they were trained."
    : "No weights on record: no step was trained on it.";
  const made = h("table", { class: "legend" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  return card("Who made the tokens", made, note(about));
}

export function audit(data: Rollout, jump: Jump): HTMLElement {
  const found = data.findings.map(({ tokens, meaning, positions }) => {
    const show = h("button", { class: "linkish", onclick: () => jump(positions[0]) }, plural(tokens, "token"));
    return h("li", {}, show, ` ${meaning.replace(/^tokens /, "")}`);
  });
  return card("Mask audit", found.length ? h("ul", { class: "findings" }, found) : clean(data));
}

function clean({ compared, trained }: Rollout): HTMLElement {
  const ok = "note ok";
  if (compared)
    return note(
      "Every token's role agrees with the messages on record, and every weight is on a role that may have it.",
      ok,
    );
  if (trained)
    return note("Every weight is on a role that may have it. The text could not be compared with messages.", ok);
  return note("No messages to compare with, and no weights.");
}

// The observation tokens that a checkpoint predicted worst, and what it expected there.
export function surprises(data: Rollout, jump: Jump): Child {
  const names = Object.keys(data.surprises);
  if (!names.length) return null;
  const list = h("ol", { class: "surprises" });
  const fill = (name: string) =>
    replace(
      list,
      data.surprises[name].map((each) => surprise(each, jump)),
    );
  const latest = names.at(-1)!;
  fill(latest);
  const choice = names.map((name): [string, string] => [name, name]);
  const at =
    names.length > 1
      ? h("label", { class: "note" }, "at ", select("Checkpoint", choice, latest, fill))
      : note(`at ${latest}`);
  return card("What surprised most", at, list);
}

function surprise({ at, before, text, nats, elsewhere, expected }: Surprise, jump: Jump): HTMLElement {
  const line = h("span", { class: "seen-before" }, visible(before.split("\n").at(-1)!));
  const others = Object.entries(elsewhere).map(([other, value]) => `; ${other} ${number(value)}`);
  const wanted = expected.slice(0, 3).map(([likely, logprob], index) => {
    return [index ? ", " : "", quoted(likely), ` ${percent(Math.exp(logprob), 2)}`];
  });
  return h(
    "li",
    {},
    h("button", { class: "linkish", onclick: () => jump(at), title: "show this token" }, line, quoted(text)),
    h("span", { class: "note" }, `${number(nats)} nats`, others),
    wanted.length ? h("span", { class: "note" }, "expected ", wanted) : null,
  );
}

export function stats(data: Rollout): Child {
  const rows = Object.entries(data.stats).filter(([, value]) => value !== 0);
  if (!rows.length) return null;
  const made = rows.map(([name, value]) => {
    return h("tr", {}, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", {}, number(value)));
  });
  const title = h("summary", {}, "Counts and seconds");
  return h("details", { class: "card" }, title, h("table", { class: "stats" }, h("tbody", {}, made)));
}

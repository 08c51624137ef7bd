// What runs measured of their policies' knowledge of the environment: both probes with examples by arm, and dreams.

import type { Dreamed, Interval, Knowledge, Maybe, Probe } from "./answers";
import { isKnown } from "./charts";
import { type Child, h, number, percent, plural, table, visible } from "./dom";
import type { Context } from "./state";

const MOST = 8; // examples that are shown
const MOST_ROWS = 10; // of the table of runs that is open at once
const BEFORE = "before training";
const METRICS: [name: string, title: string, isShare: boolean][] = [
  ["true_preferred", "true answer preferred", true],
  ["margin", "by, nats a token", false],
  ["ce_per_byte", "CE per byte", false],
  ["token_accuracy", "likeliest token right", true],
  ["line_recall", "lines predicted", true],
  ["exact_answers", "whole answers right", true],
];
const card = (title: string, ...children: Child[]) => h("section", { class: "card" }, h("h2", {}, title), children);
const note = (text: string) => h("p", { class: "note" }, text);

export function knowledge(runs: Knowledge[], context: Context): Child[] {
  return [measured(runs), probes(runs, context), dreams(runs)];
}

// ---------------------------------------------------------------- numbers

function measured(runs: Knowledge[]): Child {
  const rows = runs.flatMap(({ run, measured }) => {
    return measured.map(({ set, steps: [from, to], first, last }): Child[] => {
      const cells = METRICS.map(([name, , isShare]) => change(first?.[name], last?.[name], from !== to, isShare));
      return [run, set, from === to ? `at ${to}` : `${from} to ${to}`, ...cells];
    });
  });
  if (!rows.length) return null;
  const heads = ["run", "rollouts", "steps", ...METRICS.map(([, title]) => title)];
  const about =
    "Counterfactual probe: of each rollout one answer against the answer to another command at the same task, in the same " +
    "place; how often the true one has fewer nats a token. One half is knowing nothing of what commands do. Lines and " +
    "answers are written by the policy itself, before it sees them. Brackets are 95 % intervals over tasks.";
  const made = table("Knowledge of the environment", heads, rows);
  const folded = rows.length > MOST_ROWS ? h("details", {}, h("summary", {}, plural(rows.length, "row")), made) : made;
  return card("What each policy knows of its environment", folded, note(about));
}

type Estimate = Interval | null | undefined;

function change(first: Estimate, last: Estimate, isChange: boolean, isShare: boolean): string {
  if (!last) return "–";
  const text = (value: Maybe) => (isShare && isKnown(value) ? percent(value) : number(value));
  const bounds = isKnown(last.low) ? ` [${text(last.low)}, ${text(last.high)}]` : "";
  return `${isChange && first ? `${text(first.value)} → ` : ""}${text(last.value)}${bounds}`;
}

// ---------------------------------------------------------------- examples

type ByArm = Map<string, Probe[]>; // one probe, as each arm's seeds saw it

const margin = ({ true_ce, other_ce }: Probe) => (other_ce ?? 0) - true_ce;
const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

function probes(runs: Knowledge[], context: Context): Child {
  const found = new Map<string, ByArm>();
  const add = (arm: string, examples: Probe[]) => {
    for (const probe of examples) {
      if (probe.other_ce === null) continue;
      const arms = found.get(probe.key) ?? new Map<string, Probe[]>();
      found.set(probe.key, arms.set(arm, [...(arms.get(arm) || []), probe]));
    }
  };
  for (const { run, examples } of runs) {
    if (examples.first !== undefined) add(BEFORE, examples.first);
    add(context.sources.find(({ name }) => name === run)?.arm || run, examples.last ?? []);
  }
  // Those first on which policies differ most.
  const spread = (arms: ByArm) => {
    const margins = [...arms.values()].map((seeds) => mean(seeds.map(margin)));
    return Math.max(...margins) - Math.min(...margins);
  };
  const shown = [...found.values()].sort((a, b) => spread(b) - spread(a)).slice(0, MOST);
  if (!shown.length) return null;
  const about =
    "The probes on which policies differ most: what a command was answered, and what another command was. What training " +
    "without the world-model term forgot, and what the term kept, shows where one arm tells them apart and another does not.";
  return card("One command, and another's answer", note(about), shown.map(example));
}

function example(arms: ByArm): HTMLElement {
  const [{ task_id, command, true: came, other }] = [...arms.values()][0];
  const rows = [...arms].map(([arm, seeds]): Child[] => {
    const right = seeds.filter((probe) => margin(probe) > 0).length;
    const apart = seeds.length > 1 ? `${right} of ${seeds.length} seeds` : right ? "yes" : "no";
    const nats = [mean(seeds.map(({ true_ce }) => true_ce)), mean(seeds.map(({ other_ce }) => other_ce!))];
    return [
      arm,
      apart,
      ...nats.map((value) => number(value)),
      h("pre", { class: "written" }, visible(seeds[0].written)),
    ];
  });
  const heads = ["", "tells them apart", "true, nats", "other, nats", "what it writes itself"];
  return h(
    "article",
    { class: "probe" },
    h("h3", {}, h("code", {}, visible(command)), " ", h("span", { class: "note" }, task_id)),
    beside(["it was answered", came], ["another command was answered", other ?? ""]),
    table(`What each arm makes of ${command}`, heads, rows),
  );
}

function beside(...sides: [title: string, text: string][]): HTMLElement {
  const column = ([title, text]: [string, string]) => {
    return h("div", {}, h("p", { class: "note" }, title), h("pre", { class: "screen" }, visible(text)));
  };
  return h("div", { class: "pair" }, sides.map(column));
}

// ---------------------------------------------------------------- dreams

function dreams(runs: Knowledge[]): Child {
  const all = runs.flatMap(({ run, dreams }) => dreams.map((dreamed) => [run, dreamed] as const));
  if (!all.length) return null;
  const about = "What a policy expected a command to be answered with, before it saw the answer (backtalk dream).";
  return card(
    "Dreams",
    note(about),
    all.toReversed().map(([run, dreamed]) => dream(run, dreamed)),
  );
}

function dream(run: string, { step, command, expected, actual, ce }: Dreamed): HTMLElement {
  const facts = `${run} after ${number(step)} steps · ${number(ce)} nats a token`;
  return h(
    "article",
    { class: "probe" },
    h("h3", {}, h("code", {}, visible(command)), " ", h("span", { class: "note" }, facts)),
    beside(["expected", expected], ["came", actual]),
  );
}

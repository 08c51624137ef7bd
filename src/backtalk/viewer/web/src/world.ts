// What scored rollouts tell of each checkpoint's world model: by tool and kind of output, how sure it is, and examples.

import type { Checkpoint, Example, Knowledge, World } from "./answers";
import { ask } from "./api";
import { calibration } from "./calibration";
import { knowledge } from "./knowledge";
import { type Child, h, number, plural, quoted, replace, select, signed, table, visible } from "./dom";
import { change, type Context, link, type Page } from "./state";
import { studies } from "./studies";

const WAIT_MS = 60; // before the files left are asked for
const KNOWLEDGE = /CE|true answer|token accuracy|lines predicted/; // metrics of a study that are of the world model

export async function world(main: HTMLElement, params: URLSearchParams, context: Context): Promise<Page> {
  let open = true;
  const state = { before: params.get("before") || "", after: params.get("after") || "" };

  let known: Knowledge[] = [];

  async function load(): Promise<void> {
    const found = await ask("world", { ...state, runs: context.asked() });
    if (!open) return;
    draw(found);
    if (found.pending) setTimeout(() => open && load(), WAIT_MS);
  }

  function choose(changes: Partial<typeof state>): void {
    Object.assign(state, changes);
    change(changes);
    load();
  }

  function draw(found: World): void {
    const { checkpoints } = found;
    replace(
      main,
      h(
        "div",
        { class: "world" },
        h("h1", { class: "unseen" }, "World model"),
        checkpoints.length ? [summary(found), byKind(checkpoints), calibration(checkpoints)] : null,
        checkpoints.length || known.length ? null : unscored(),
        checkpoints.length ? changed(found, choose) : null,
        studies(found.studies, ({ metric }) => KNOWLEDGE.test(metric)),
        knowledge(known, context),
        found.problems.length
          ? h(
              "ul",
              { class: "notice" },
              found.problems.map((text) => h("li", {}, visible(text))),
            )
          : null,
      ),
    );
  }

  async function refresh(): Promise<void> {
    known = await ask("knowledge", { runs: context.asked() });
    await load();
  }

  await refresh();
  return {
    keys: {},
    refresh,
    close: () => {
      open = false;
    },
  };
}

function summary({ rollouts, checkpoints, pending }: World): Child {
  const facts = [plural(rollouts, "scored rollout"), plural(checkpoints.length, "checkpoint")];
  if (pending) facts.push(`${plural(pending, "file")} still to read`);
  return h("p", { class: "summary", role: "status" }, facts.join(" · "));
}

function unscored(): Child {
  const about =
    "What a policy knows of its environment shows in how well it predicts what the environment answers. " +
    "One command scores recorded rollouts, before and after training, or at any checkpoints:";
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "No rollout here has been scored"),
    h("p", { class: "note" }, about),
    h("pre", {}, "backtalk score RUN\nbacktalk score RUN --checkpoint GRPO_RUN --checkpoint ECHO_RUN"),
  );
}

function byKind(checkpoints: Checkpoint[]): Child {
  const keyOf = ({ tool, kind }: { tool: string; kind: string }) => `${tool}\n${kind}`;
  const keys = new Map(checkpoints.flatMap(({ rows }) => rows.map((row) => [keyOf(row), row] as const)));
  const rows = [...keys].map(([key, { tool, kind, tokens }]): Child[] => {
    const found = checkpoints.map((checkpoint) => checkpoint.rows.find((row) => keyOf(row) === key));
    return [tool || "no tool", kind, number(tokens), ...found.map((row) => number(row?.ce))];
  });
  const most = Math.max(...checkpoints.map(({ tokens }) => tokens));
  rows.push(["all", "", number(most), ...checkpoints.map(({ ce }) => number(ce))]);
  const heads = ["tool", "kind of output", "tokens", ...checkpoints.map(({ name }) => name)];
  const note =
    "“Repeats the command” are runs of three tokens or more that stand in the turn's action too: predicting them takes " +
    "no knowledge of the environment. “Harness” is what Backtalk writes itself.";
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Cross-entropy of observations, nats a token"),
    table("Cross-entropy by tool and kind", heads, rows, "kinds by-kind"),
    h("p", { class: "note" }, note),
  );
}

// ---------------------------------------------------------------- what one knows and the other does not

function changed(found: World, choose: (changes: { before?: string; after?: string }) => void): Child {
  const { checkpoints, before, after } = found;
  if (checkpoints.length < 2) {
    const about =
      "One checkpoint has scored these rollouts. A second one shows what training learned, and what it lost.";
    return h("section", { class: "card" }, h("h2", {}, "Before and after"), h("p", { class: "note" }, about));
  }
  const names = checkpoints.map(({ name }): [string, string] => [name, name]);
  const choice = h(
    "p",
    { class: "choice note" },
    "from ",
    select("before", names, before, (name) => choose({ before: name })),
    " to ",
    select("after", names, after, (name) => choose({ after: name })),
    ": of each rollout the token of output that got better most, and worse most; not what repeats the command",
  );
  const better = found.better.filter(({ gain }) => gain > 0);
  const worse = found.worse.filter(({ gain }) => gain < 0);
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "What one knows and the other does not"),
    choice,
    h(
      "div",
      { class: "pair" },
      examples(`${after} predicts better`, better),
      examples(`${after} predicts worse`, worse),
    ),
  );
}

function examples(title: string, rows: Example[]): Child {
  const list = rows.length ? h("ol", { class: "examples" }, rows.map(example)) : h("p", { class: "note" }, "None.");
  return h("section", {}, h("h3", {}, title), list);
}

function example({ run, part, row, at, text_before, text, gain, nats, expected }: Example): HTMLElement {
  const href = link("rollout", { run, part, row, tokens: 1, pos: at });
  const lines = text_before.split("\n").slice(-2).join("\n");
  const wanted = expected.map(([first], side) => {
    return first === undefined ? null : [side ? "; then " : "; expected ", quoted(first)];
  });
  return h(
    "li",
    {},
    h("a", { href }, h("span", { class: "seen-before" }, visible(lines)), quoted(text)),
    h(
      "span",
      { class: "note" },
      `${signed(gain)} nats: cross-entropy ${number(nats[0])}, then ${number(nats[1])}`,
      wanted,
    ),
  );
}

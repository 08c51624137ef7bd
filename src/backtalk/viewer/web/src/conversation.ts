// One rollout as a conversation: what was given, calls, output as a terminal shows it, branches, failures.

import { terminal } from "./ansi";
import type { Call, Failure, Role, Rollout, Segment } from "./answers";
import { type Child, h, number, plural, replace, signed, visible } from "./dom";

const LONG_CHARS = 12000; // of one output, before it is folded
const LONG_GIVEN = 1500; // of given text, which people know
export const NAMES: Record<Role, string> = {
  CONTEXT: "given text",
  TEMPLATE: "chat template",
  ACTION: "action",
  ENV_OUTPUT: "environment output",
  WARNING: "harness",
};

type Kind = "template" | "action" | "context" | "output";
const KINDS: Record<Role, Kind> = {
  TEMPLATE: "template",
  ACTION: "action",
  CONTEXT: "context",
  ENV_OUTPUT: "output",
  WARNING: "output",
};

interface Block {
  kind: Kind;
  turn: number | null;
  branch: number;
  segments: Segment[];
}

export interface Options {
  raw?: boolean; // output as it is, not as a terminal shows it
  template?: boolean; // the chat template too
  tokens?: ((segments: Segment[]) => Child) | null; // what shows tokens in place of text
}

export function conversation(data: Rollout, options: Options = {}): Child[] {
  const parts: Child[] = [];
  let branch = 0;
  let turn: number | null = null;
  for (const block of blocksOf(data.segments)) {
    if (block.branch !== branch) {
      branch = block.branch;
      const text = `branch ${branch}: the history so far was rewritten, and sampling went on from here`;
      parts.push(h("div", { class: "branch", role: "separator" }, text));
    }
    if (block.kind === "action" && block.turn !== turn) {
      turn = block.turn;
      parts.push(h("h2", { class: "turn", id: `turn-${branch}-${turn}` }, `Turn ${turn}`));
    }
    if (block.kind === "template" && !options.template && !options.tokens) continue;
    const where = block.turn === null ? "" : `turn ${block.turn}, `;
    const props = {
      class: `block block-${block.kind}`,
      role: "group",
      "aria-label": where + NAMES[block.segments[0].role],
    };
    parts.push(h("div", props, label(block), body(block, options)));
  }
  if (data.failure) parts.push(failure(data.failure));
  return parts;
}

// Segments as blocks that people read: output and the harness's words of one message come together.
function blocksOf(segments: Segment[]): Block[] {
  const blocks: Block[] = [];
  for (const segment of segments) {
    const { turn, branch } = segment;
    const kind = KINDS[segment.role];
    const last = blocks.at(-1);
    const joins = last && kind === "output" && last.kind === kind && last.turn === turn && last.branch === branch;
    if (joins) last.segments.push(segment);
    else blocks.push({ kind, turn, branch, segments: [segment] });
  }
  return blocks;
}

function label({ segments, kind }: Block): HTMLElement {
  const roles = [...new Set(segments.map(({ role }) => role))];
  const { tool } = segments[0];
  return h(
    "div",
    { class: "label" },
    roles.map((role) => h("span", { class: `role role-${role}` }, NAMES[role])),
    tool && kind === "output" ? h("span", { class: "tool-name" }, tool) : null,
    h("span", { class: "facts" }, factsOf(segments, kind).join(" · ")),
  );
}

function factsOf(segments: Segment[], kind: Kind): string[] {
  const length = ({ start, end }: Segment) => end - start;
  const total = segments.reduce((sum, segment) => sum + length(segment), 0);
  const sum = (name: "policy" | "policy_tokens" | "world" | "world_tokens") => {
    return segments.reduce((all, segment) => all + (segment[name] || 0), 0);
  };
  const facts = [plural(total, "token")];
  for (const name of Object.keys(segments[0].ce || {})) {
    const nats = segments.reduce((all, segment) => all + (segment.ce?.[name] || 0) * length(segment), 0);
    facts.push(`${name} ${number(Math.round((1000 * nats) / total) / 1000)} nats`);
  }
  if (kind === "action")
    facts.push(segments[0].sampled ? `mean logprob ${number(segments[0].logprob)}` : "not sampled");
  if (sum("policy_tokens")) facts.push(`policy weight ${signed(sum("policy"))}`);
  if (sum("world_tokens")) {
    const part = sum("world_tokens") < total ? ` on ${sum("world_tokens")}` : "";
    facts.push(`world weight ${signed(sum("world"))}${part}`);
  }
  return facts;
}

function body(block: Block, options: Options): Child {
  const [first] = block.segments;
  if (options.tokens) return options.tokens(block.segments);
  if (block.kind === "action") return actionBody(first, Boolean(options.raw));
  if (block.kind === "output") return outputBody(block.segments, Boolean(options.raw));
  if (block.kind === "template") return folded(first.text, visible, "template-text");
  return folded(first.text, visible, "said", LONG_GIVEN);
}

// Long text is folded: what is not looked at costs no time.
function folded(text: string, make: (text: string) => Child[], className: string, most = LONG_CHARS): HTMLElement {
  if (text.length <= most) return h("pre", { class: className }, make(text));
  const show = `show ${number(text.length - most)} more characters`;
  const element = h("pre", { class: className });
  const more = h("button", { class: "more", onclick: () => replace(element, make(text)) }, show);
  replace(element, make(text.slice(0, most / 2)), "\n", more, "\n", make(text.slice(-most / 2)));
  return element;
}

function actionBody({ text, action }: Segment, raw: boolean): Child {
  if (raw || !action) return folded(text, visible, "said");
  const { thinking, said, calls } = action;
  if (!thinking && !said && !calls?.length) return h("p", { class: "nothing" }, "nothing");
  return [
    thinking ? thoughts(thinking) : null,
    said ? folded(said, visible, "said") : null,
    (calls || []).map(callCard),
  ];
}

function thoughts(thinking: string): HTMLElement {
  const title = h("summary", {}, `thinking, ${plural(thinking.length, "character")}`);
  return h("details", { class: "thinking" }, title, h("pre", {}, visible(thinking)));
}

function callCard({ tool, arguments: given }: Call): HTMLElement {
  const entries = Object.entries(given);
  const text = (value: unknown) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));
  const isOneText = entries.length === 1 && typeof entries[0][1] === "string";
  const shown = isOneText
    ? h("pre", {}, visible(text(entries[0][1])))
    : h(
        "dl",
        {},
        entries.map(([name, value]) => {
          return [h("dt", {}, visible(name)), h("dd", {}, h("pre", {}, visible(text(value))))];
        }),
      );
  const props = { class: "call", role: "group", "aria-label": `call of ${tool}` };
  return h("div", props, h("span", { class: "call-tool" }, visible(tool)), shown);
}

function outputBody(segments: Segment[], raw: boolean): HTMLElement {
  const make = raw ? visible : terminal;
  const parts = segments.map(({ text, role }) => {
    return folded(text.replace(/\n$/, ""), make, role === "WARNING" ? "output harness" : "output");
  });
  return h("div", { class: "screen" }, parts);
}

function failure({ phase, error, message, traceback }: Failure): HTMLElement {
  const about =
    "The infrastructure broke, so there is no reward; what the environment had said by then can still be learned from.";
  return h(
    "div",
    { class: "failure", role: "group", "aria-label": "failure" },
    h("h2", {}, `Failed in ${phase}: ${error}`),
    h("p", {}, about),
    folded(message || "it said nothing", visible, ""),
    traceback ? h("details", {}, h("summary", {}, "traceback"), h("pre", {}, visible(traceback))) : null,
  );
}

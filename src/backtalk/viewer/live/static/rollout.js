// One rollout as a conversation, and every token of it with its role, weight in the loss and log-probability.

import { terminal } from "./ansi.js";
import { ask } from "./api.js";
import { announce, copy, h, number, plural, replace, signed, visible } from "./dom.js";
import { change, link, read } from "./state.js";
import { tokenView } from "./tokens.js";

const LONG_CHARS = 12000; // of one output, before it is folded
const LONG_GIVEN = 1500; // of given text, which people know
export const NAMES = { CONTEXT: "given text", TEMPLATE: "chat template", ACTION: "action", ENV_OUTPUT: "environment output", WARNING: "harness" };

// ---------------------------------------------------------------- blocks

// Segments as blocks that people read: output and the harness's words of one message come together.
function blocksOf(segments) {
  const blocks = [];
  for (const segment of segments) {
    const kind = { TEMPLATE: "template", ACTION: "action", CONTEXT: "context" }[segment.role] || "output";
    const last = blocks.at(-1);
    if (last && last.kind === kind && kind === "output" && last.turn === segment.turn && last.branch === segment.branch) last.segments.push(segment);
    else blocks.push({ kind, turn: segment.turn, branch: segment.branch, segments: [segment] });
  }
  return blocks;
}

function label(block) {
  const { segments, kind } = block;
  const roles = [...new Set(segments.map((segment) => segment.role))];
  const total = segments.reduce((sum, segment) => sum + segment.end - segment.start, 0);
  const sum = (name) => segments.reduce((all, segment) => all + (segment[name] || 0), 0);
  const facts = [plural(total, "token")];
  const before = segments.filter((segment) => segment.ce);
  for (const name of Object.keys(before[0]?.ce || {})) {
    const nats = before.reduce((sum_, segment) => sum_ + segment.ce[name] * (segment.end - segment.start), 0);
    facts.push(`${name} ${number(Math.round((1000 * nats) / total) / 1000)} nats`);
  }
  if (kind === "action") facts.push(segments[0].sampled ? `mean logprob ${number(segments[0].logprob)}` : "not sampled");
  if (sum("policy_tokens")) facts.push(`policy weight ${signed(sum("policy"))}`);
  if (sum("world_tokens")) facts.push(`world weight ${signed(sum("world"))}${sum("world_tokens") < total ? ` on ${sum("world_tokens")}` : ""}`);
  return h("div", { class: "label" }, roles.map((role) => h("span", { class: `role role-${role}` }, NAMES[role])),
    block.segments[0].tool && kind === "output" ? h("span", { class: "tool-name" }, block.segments[0].tool) : null,
    h("span", { class: "facts" }, facts.join(" · ")));
}

// Long text is folded: what is not looked at costs no time.
function folded(text, make, className, most = LONG_CHARS) {
  const element = h("pre", { class: className });
  if (text.length <= most) return element.append(...make(text)), element;
  const head = text.slice(0, most / 2);
  const tail = text.slice(-most / 2);
  const more = h("button", { class: "more", onclick: () => replace(element, make(text)) }, `show ${number(text.length - most)} more characters`);
  element.append(...make(head), "\n", more, "\n", ...make(tail));
  return element;
}

function actionBody(segment, raw) {
  if (raw) return folded(segment.text, visible, "said");
  const { thinking, said, calls } = segment.action;
  const parts = [];
  if (thinking) parts.push(h("details", { class: "thinking" }, h("summary", {}, `thinking, ${plural(thinking.length, "character")}`), h("pre", {}, visible(thinking))));
  if (said) parts.push(folded(said, visible, "said"));
  for (const call of calls || []) parts.push(callCard(call));
  if (!parts.length) parts.push(h("p", { class: "nothing" }, "nothing"));
  return parts;
}

function callCard(call) {
  const entries = Object.entries(call.arguments);
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));
  const body = entries.length === 1 && typeof entries[0][1] === "string"
    ? h("pre", {}, visible(entries[0][1]))
    : h("dl", {}, entries.map(([name, value]) => [h("dt", {}, visible(name)), h("dd", {}, h("pre", {}, visible(text(value))))]));
  return h("div", { class: "call", role: "group", "aria-label": `call of ${call.tool}` }, h("span", { class: "call-tool" }, visible(call.tool)), body);
}

function outputBody(segments, raw) {
  return h("div", { class: "screen" }, segments.map((segment) => {
    const make = raw ? visible : terminal;
    return folded(segment.text.replace(/\n$/, ""), make, `output ${segment.role === "WARNING" ? "harness" : ""}`);
  }));
}

export function conversation(data, options = {}) {
  const parts = [];
  let branch = 0;
  let turn = null;
  for (const block of blocksOf(data.segments)) {
    if (block.branch !== branch) {
      branch = block.branch;
      parts.push(h("div", { class: "branch", role: "separator" }, `branch ${branch}: the history so far was rewritten, and sampling went on from here`));
    }
    if (block.kind === "action" && block.turn !== turn) {
      turn = block.turn;
      parts.push(h("h2", { class: "turn", id: `turn-${branch}-${turn}` }, `Turn ${turn}`));
    }
    if (block.kind === "template" && !options.template && !options.tokens) continue;
    const body = options.tokens
      ? options.tokens(block.segments)
      : block.kind === "action" ? actionBody(block.segments[0], options.raw)
      : block.kind === "output" ? outputBody(block.segments, options.raw)
      : block.kind === "template" ? folded(block.segments[0].text, visible, "template-text")
      : folded(block.segments[0].text, visible, "said", options.compact ? LONG_CHARS : LONG_GIVEN);
    parts.push(h("div", { class: `block block-${block.kind}`, role: "group", "aria-label": `${block.turn === null ? "" : `turn ${block.turn}, `}${NAMES[block.segments[0].role]}` }, label(block), body));
  }
  if (data.failure) parts.push(failure(data.failure));
  return parts;
}

export function failure(failed) {
  return h("div", { class: "failure", role: "group", "aria-label": "failure" },
    h("h2", {}, `Failed in ${failed.phase}: ${failed.error}`),
    h("p", {}, "The infrastructure broke, so there is no reward; what the environment had said by then can still be learned from."),
    h("pre", {}, visible(failed.message || "it said nothing")));
}

// ---------------------------------------------------------------- facts beside it

function heading(data) {
  const where = data.kind === "train" ? `training step ${data.step}` : data.kind === "eval" ? `evaluation before step ${data.step}` : "file";
  const advantage = !data.trained ? (data.kind === "train" ? "not trained (yet)" : null) : data.advantage === null ? "outside the policy term" : signed(data.advantage);
  const fact = (name, value, extra = "") => h("div", { class: `fact ${extra}` }, h("dt", {}, name), h("dd", {}, value));
  const scale = data.reward === null ? "" : data.reward > 0 ? "good" : "";
  return h("header", { class: "rollout-head" },
    h("p", { class: "crumbs" }, h("a", { href: back() }, "Rollouts"), ` / ${data.run} / ${where} / `,
      h("a", { href: link("group", { run: data.run, part: data.part, group: data.group }) }, `group ${data.group}`), ` / sample ${data.sample}`),
    h("h1", {}, visible(data.task)),
    h("dl", { class: "facts-row" },
      fact("reward", number(data.reward), scale), advantage && fact("advantage", advantage), fact("ended", data.stop.replace("_", " "), data.failure ? "bad" : ""),
      fact("turns", number(data.turns)), fact("tokens", number(data.tokens)),
      data.branches > 1 ? fact("branches", number(data.branches)) : null, data.kind === "file" ? null : fact("policy version", number(data.version))));
}

function siblings(data) {
  if (data.siblings.length < 2) return null;
  const most = Math.max(...data.siblings.map((row) => Math.abs(row.reward ?? 0)), 1e-9);
  const one = (row) => h("a", {
    class: `sibling${row.row === data.row ? " here" : ""}${row.stop === "failed" ? " failed" : ""}`,
    href: link("rollout", { ...Object.fromEntries(read().params), row: row.row, pos: null }), "aria-current": row.row === data.row ? "true" : null,
    title: `sample ${row.sample}, reward ${number(row.reward)}, advantage ${signed(row.advantage)}, ${row.stop}`,
  }, h("span", { class: "sibling-bar" }, h("span", { style: { height: `${row.reward === null ? 0 : Math.max(6, (100 * Math.abs(row.reward)) / most)}%` } })), row.stop === "failed" ? "✕" : number(row.reward, 2));
  return h("nav", { class: "siblings", "aria-label": "Rollouts of the same task" }, data.siblings.map(one),
    h("a", { class: "side-by-side", href: link("group", { run: data.run, part: data.part, group: data.group }) }, "side by side"));
}

function legend(data) {
  const rows = data.roles.map((row) => h("tr", {},
    h("th", { scope: "row" }, h("span", { class: `role role-${row.role}` }, row.role), h("span", { class: "meaning" }, NAMES[row.role])),
    h("td", {}, number(row.tokens)),
    h("td", { title: row.policy_tokens ? `on ${row.policy_tokens} tokens` : "" }, row.policy_tokens ? signed(row.policy_sum, 2) : "–"),
    h("td", { title: row.world_tokens ? `on ${row.world_tokens} tokens` : "" }, row.world_tokens ? signed(row.world_sum, 2) : "–")));
  return h("section", { class: "card" }, h("h2", {}, "Who made the tokens"),
    h("table", { class: "legend" }, h("thead", {}, h("tr", {}, h("th", {}, "role"), h("th", {}, "tokens"), h("th", { title: "sum of the weights in the policy term; positive: training makes them likelier" }, "policy"), h("th", { title: "sum of the weights in the world-model term" }, "world"))), h("tbody", {}, rows)),
    h("p", { class: "note" }, data.trained ? "Sums of the weights in the loss, as they were trained." : "No weights on record: no step was trained on it."));
}

function audit(data) {
  const found = data.findings.map((finding) => h("li", {}, h("button", { class: "linkish", onclick: () => jump(finding.positions[0]) }, plural(finding.tokens, "token")), ` ${finding.meaning.replace(/^tokens /, "")}`));
  const clean = data.compared ? "Every token's role agrees with the messages on record, and every weight is on a role that may have it." : data.trained ? "Every weight is on a role that may have it. The text could not be compared with messages." : "No messages to compare with, and no weights.";
  return h("section", { class: "card" }, h("h2", {}, "Mask audit"), found.length ? h("ul", { class: "findings" }, found) : h("p", { class: `note${data.compared || data.trained ? " ok" : ""}` }, clean));
}

// The observation tokens that a checkpoint predicted worst, and what it expected there.
function surprises(data) {
  const names = Object.keys(data.surprises);
  if (!names.length) return null;
  const list = h("ol", { class: "surprises" });
  const share = (logprob) => `${number(100 * Math.exp(logprob), 2)} %`;
  const quoted = (text) => h("code", {}, visible(JSON.stringify(text).slice(1, -1)));
  const fill = (name) => replace(list, data.surprises[name].map((each) => h("li", {},
    h("button", { class: "linkish", onclick: () => jump(each.at), title: "show this token" }, h("span", { class: "seen-before" }, visible(each.before.split("\n").at(-1))), quoted(each.text)),
    h("span", { class: "note" }, `${number(each.nats)} nats`, Object.entries(each.elsewhere).map(([other, nats]) => `; ${other} ${number(nats)}`)),
    each.expected.length ? h("span", { class: "note" }, "expected ", each.expected.slice(0, 3).map(([text, logprob], index) => [index ? ", " : "", quoted(text), ` ${share(logprob)}`])) : null)));
  const latest = names.at(-1);
  fill(latest);
  return h("section", { class: "card" }, h("h2", {}, "What surprised most"),
    names.length > 1 ? h("label", { class: "note" }, "at ", h("select", { "aria-label": "Checkpoint", onchange: (event) => fill(event.target.value) }, names.map((name) => h("option", { value: name, selected: name === latest }, name)))) : h("p", { class: "note" }, `at ${latest}`), list);
}

function stats(data) {
  const rows = Object.entries(data.stats).filter(([, value]) => value !== 0);
  return rows.length ? h("details", { class: "card" }, h("summary", {}, "Counts and seconds"), h("table", { class: "stats" }, h("tbody", {}, rows.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name.replaceAll("_", " ")), h("td", {}, number(value))))))) : null;
}

const back = () => { try { return sessionStorage.getItem("table") || link("rollouts"); } catch { return link("rollouts"); } };
function jump(position) { change({ tokens: true, pos: position }); window.dispatchEvent(new HashChangeEvent("hashchange")); }

// One line of our own format, so that what went wrong can be looked at, counted and tested elsewhere.
async function saveCase(which, data) {
  const href = URL.createObjectURL(new Blob([`${JSON.stringify(await ask("record", which))}\n`], { type: "application/jsonl" }));
  h("a", { href, download: `${data.task}-${data.part}-${data.sample}.jsonl`.replace(/[^\w.-]+/g, "_").replace(/^\.+/, "") }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
  announce("Saved; backtalk view FILE opens it");
}

// ---------------------------------------------------------------- the page

export async function rollout(main, params) {
  const which = { run: params.get("run"), part: params.get("part"), row: params.get("row") };
  let data = await ask("rollout", which);
  const scored = Object.keys(data.surprises);
  const options = { tokens: params.has("tokens"), sides: params.has("sides"), raw: params.has("raw"), template: params.has("template") };
  const talk = h("div", { class: "talk" });
  const status = h("div", { class: "token-status", role: "status", "aria-live": "polite", hidden: true });
  let view = null;

  async function draw() {
    if (options.sides) options.tokens = true;
    if (options.tokens && !view) view = tokenView(await ask("tokens", which), data, status, (position) => change({ pos: position }), params.get("colour"));
    view?.setSides(options.sides);
    replace(talk, conversation(data, { ...options, tokens: options.tokens ? view.render : null }));
    status.hidden = !options.tokens;
    for (const button of tools.querySelectorAll("[data-option]")) button.setAttribute("aria-pressed", String(options[button.dataset.option]));
    if (options.tokens && read().params.has("pos")) view.select(Number(read().params.get("pos")), true);
  }
  const flip = (name) => async () => {
    options[name] = !options[name];
    if (name === "tokens" && !options.tokens) change({ sides: (options.sides = false) });
    change({ [name]: options[name], pos: options.tokens ? read().params.get("pos") : null });
    await draw();
  };
  const copyRecord = async (event) => copy(JSON.stringify(await ask("record", which), null, 1), event?.currentTarget);
  const tools = h("div", { class: "tools", role: "toolbar", "aria-label": "How it is shown" },
    [["tokens", "tokens", "t"], scored.length > 1 ? ["sides", "before and after", "b"] : null, ["template", "template", "m"], ["raw", "raw", "r"]].filter(Boolean).map(([name, title, key]) => h("button", { "data-option": name, onclick: flip(name) }, title, h("kbd", {}, key))),
    h("button", { onclick: copyRecord }, "copy JSON", h("kbd", {}, "c")), h("button", { onclick: () => saveCase(which, data), title: "as a file that backtalk view, account and import read" }, "save as a case", h("kbd", {}, "x")));
  const notes = [
    data.tokens_of ? h("p", { class: "notice" }, `Text was recorded, not tokens. The tokens shown are those of the model ${data.tokens_of}.`) : null,
    scored.length || data.kind === "file" && !data.has_text ? null : h("p", { class: "note" }, "No checkpoint has scored these tokens: ", h("code", {}, "backtalk score"), " does, and then each shows its cross-entropy and what the policy expected."),
    data.has_text ? null : h("p", { class: "notice" }, "The file holds token ids, and no tokenizer is known. Start the viewer with --model NAME to read them."),
  ];
  replace(main, h("div", { class: "rollout" }, h("div", { class: "rollout-main" }, heading(data), siblings(data), notes, tools, talk),
    h("div", { class: "rollout-side" }, surprises(data), legend(data), audit(data), stats(data))), status);
  main.scrollTop = 0;
  await draw();

  const around = (list, step) => list[list.findIndex((row) => row.run === data.run && row.part === data.part && row.row === data.row) + step];
  const open = (row) => (row ? (location.hash = link("rollout", { ...Object.fromEntries(read().params), run: row.run, part: row.part, row: row.row, pos: null })) : announce("That was the last one"));
  const inTable = (step) => () => { try { open(around(JSON.parse(sessionStorage.getItem("order") || "[]"), step)); } catch { announce("No table was open"); } };
  const turns = (step) => () => {
    const all = [...talk.querySelectorAll(".turn")];
    const here = all.findIndex((turn) => turn.getBoundingClientRect().top > 110);
    const next = step > 0 ? all.find((turn) => turn.getBoundingClientRect().top > 120) : all[(here < 0 ? all.length : here) - 2] || all[0];
    next?.scrollIntoView({ block: "start" });
  };
  return {
    keys: {
      t: flip("tokens"), b: () => scored.length > 1 && flip("sides")(), x: () => saveCase(which, data), r: flip("raw"), m: flip("template"), c: () => copyRecord(), u: () => (location.hash = back()),
      s: () => (location.hash = link("group", { run: data.run, part: data.part, group: data.group })),
      "[": inTable(-1), "]": inTable(1), j: turns(1), k: turns(-1),
      ArrowRight: () => (options.tokens && view.selected() !== null ? view.move(1) : open(around(data.siblings, 1))),
      ArrowLeft: () => (options.tokens && view.selected() !== null ? view.move(-1) : open(around(data.siblings, -1))),
      Escape: () => view?.select(null),
    },
    async refresh() {
      if (data.trained || data.kind !== "train") return;
      const next = await ask("rollout", which);
      if (next.trained) { data = next; view = null; window.dispatchEvent(new HashChangeEvent("hashchange")); }
    },
  };
}

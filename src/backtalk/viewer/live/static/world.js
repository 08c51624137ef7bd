// What scored rollouts tell of each checkpoint's world model: by tool and kind of output, how sure it is, and examples.

import { ask } from "./api.js";
import { h, number, plural, replace, signed, visible } from "./dom.js";
import { change, link, read } from "./state.js";
import { studies } from "./studies.js";

const WAIT_MS = 60; // before the files left are asked for
const SIZE = 220; // of the calibration's picture

export async function world(main, params, context) {
  let open = true;
  const state = { before: params.get("before") || "", after: params.get("after") || "" };
  const question = () => ask("world", { ...state, runs: context.selected(read().params).length === context.sources.length ? "" : context.selected(read().params).join("\n") });

  async function load() {
    const found = await question();
    if (!open) return;
    draw(found);
    if (found.pending) setTimeout(() => open && load(), WAIT_MS);
  }

  function draw(found) {
    const { checkpoints } = found;
    const parts = [h("h1", { class: "unseen" }, "World model")];
    if (!checkpoints.length) parts.push(unscored());
    else {
      const facts = [`${plural(found.rollouts, "scored rollout")}`, plural(checkpoints.length, "checkpoint")];
      if (found.pending) facts.push(`${plural(found.pending, "file")} still to read`);
      parts.push(h("p", { class: "summary", role: "status" }, facts.join(" · ")), byKind(checkpoints), calibration(checkpoints, context), changed(found, checkpoints));
    }
    parts.push(studies(found.studies, (row) => row.metric.includes("CE")));
    if (found.problems.length) parts.push(h("ul", { class: "notice" }, found.problems.map((text) => h("li", {}, visible(text)))));
    replace(main, h("div", { class: "world" }, parts));
  }

  function unscored() {
    return h("section", { class: "card" }, h("h2", {}, "No rollout here has been scored"),
      h("p", { class: "note" }, "What a policy knows of its environment shows in how well it predicts what the environment answers. One command scores recorded rollouts, before and after training, or at any checkpoints:"),
      h("pre", {}, "backtalk score RUN\nbacktalk score RUN --checkpoint GRPO_RUN --checkpoint ECHO_RUN"));
  }

  function changed(found, checkpoints) {
    if (checkpoints.length < 2) return h("section", { class: "card" }, h("h2", {}, "Before and after"), h("p", { class: "note" }, "One checkpoint has scored these rollouts. A second one shows what training learned, and what it lost."));
    const choose = (which, chosen) => h("select", { "aria-label": which, onchange: (event) => { state[which] = event.target.value; change({ [which]: state[which] }); load(); } }, checkpoints.map(({ name }) => h("option", { value: name, selected: name === chosen }, name)));
    const quoted = (text) => h("code", {}, visible(JSON.stringify(text).slice(1, -1)));
    const example = (each) => h("li", {},
      h("a", { href: link("rollout", { run: each.run, part: each.part, row: each.row, tokens: 1, pos: each.at }) }, h("span", { class: "seen-before" }, visible(each.text_before.split("\n").slice(-2).join("\n"))), quoted(each.text)),
      h("span", { class: "note" }, `${signed(each.gain)} nats: cross-entropy ${number(each.nats[0])}, then ${number(each.nats[1])}`, each.expected.map((texts, side) => texts.length ? [side ? "; then " : "; expected ", quoted(texts[0])] : null)));
    const list = (title, rows) => h("section", {}, h("h3", {}, title), rows.length ? h("ol", { class: "examples" }, rows.map(example)) : h("p", { class: "note" }, "None."));
    return h("section", { class: "card" }, h("h2", {}, "What one knows and the other does not"),
      h("p", { class: "choice note" }, "from ", choose("before", found.before), " to ", choose("after", found.after), ": of each rollout the token of output that got better most, and worse most; not what repeats the command"),
      h("div", { class: "pair" }, list(`${found.after} predicts better`, found.better.filter((each) => each.gain > 0)), list(`${found.after} predicts worse`, found.worse.filter((each) => each.gain < 0))));
  }

  await load();
  return { keys: {}, refresh: load, close: () => { open = false; } };
}

function byKind(checkpoints) {
  const keys = new Map();
  for (const { rows } of checkpoints) for (const row of rows) keys.set(`${row.tool}\n${row.kind}`, row);
  const of = (checkpoint, key) => checkpoint.rows.find((row) => `${row.tool}\n${row.kind}` === key);
  const body = [...keys].map(([key, { tool, kind, tokens }]) => h("tr", {}, h("th", { scope: "row" }, tool || "no tool"), h("td", { class: "words" }, kind), h("td", {}, number(tokens)), checkpoints.map((checkpoint) => h("td", {}, number(of(checkpoint, key)?.ce)))));
  const total = h("tr", { class: "total" }, h("th", { scope: "row" }, "all"), h("td", {}), h("td", {}, number(Math.max(...checkpoints.map(({ tokens }) => tokens)))), checkpoints.map(({ ce }) => h("td", {}, number(ce))));
  return h("section", { class: "card" }, h("h2", {}, "Cross-entropy of observations, nats a token"),
    h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Cross-entropy by tool and kind" }, h("table", { class: "kinds" },
      h("thead", {}, h("tr", {}, ["tool", "kind of output", "tokens", ...checkpoints.map(({ name }) => name)].map((title, index) => h("th", { scope: "col", class: index === 1 ? "words" : null }, title)))), h("tbody", {}, body, total))),
    h("p", { class: "note" }, "“Repeats the command” are runs of three tokens or more that stand in the turn's action too: predicting them takes no knowledge of the environment. “Harness” is what Backtalk writes itself."));
}

// How often the likeliest token came, by how likely the model thought it: on the diagonal it knows how much it knows.
function calibration(checkpoints) {
  const known = checkpoints.filter(({ bins }) => bins.length);
  if (!known.length) return null;
  const style = getComputedStyle(document.documentElement);
  const colour = (index) => style.getPropertyValue(`--line-${index % 8}`).trim();
  const at = (x) => (12 + x * (SIZE - 24)).toFixed(1);
  const up = (y) => (SIZE - 12 - y * (SIZE - 24)).toFixed(1);
  const lines = known.map(({ bins }, index) => [svg("polyline", { points: bins.map(({ sure, right }) => `${at(sure)},${up(right)}`).join(" "), fill: "none", stroke: colour(index), "stroke-width": "2" }), bins.map(({ sure, right }) => svg("circle", { cx: at(sure), cy: up(right), r: "3", fill: colour(index) }))]);
  const picture = svg("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, width: String(SIZE), height: String(SIZE), role: "img", "aria-label": "Calibration; the table beside it has the numbers" },
    svg("rect", { x: "12", y: "12", width: String(SIZE - 24), height: String(SIZE - 24), fill: "none", stroke: style.getPropertyValue("--line") }), svg("line", { x1: at(0), y1: up(0), x2: at(1), y2: up(1), stroke: style.getPropertyValue("--faint"), "stroke-dasharray": "4 4" }), lines);
  const table = h("table", { class: "kinds" }, h("thead", {}, h("tr", {}, ["checkpoint", "the likeliest token came", "it was given", "error"].map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, known.map(({ name, bins, calibration_error: error }, index) => {
      const total = bins.reduce((sum, { tokens }) => sum + tokens, 0);
      const mean = (column) => bins.reduce((sum, row) => sum + row[column] * row.tokens, 0) / total;
      return h("tr", {}, h("th", { scope: "row" }, h("span", { class: "swatch", style: { background: colour(index) } }), " ", name), h("td", {}, `${number(100 * mean("right"))} %`), h("td", {}, `${number(100 * mean("sure"))} %`), h("td", {}, `${number(100 * error)} points`));
    })));
  return h("section", { class: "card" }, h("h2", {}, "Does it know how much it knows?"), h("div", { class: "calibration" }, picture, h("div", {}, h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Calibration" }, table),
    h("p", { class: "note" }, "Across: the probability of the likeliest token, in ten bins. Up: how often it was the one that came. Below the diagonal a model is too sure. The error is the mean distance from the diagonal, weighted by tokens."))));
}

function svg(tag, props, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children.flat(Infinity));
  return element;
}

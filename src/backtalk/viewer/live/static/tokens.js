// Every token: its role as a colour, whether it was trained as an underline, all its numbers below the page.

import { h, number, replace, signed, visible } from "./dom.js";
import { change } from "./state.js";

const COLOURINGS = { role: "who made it", policy: "policy weight", world: "world weight", logprob: "log-probability when sampled" };
const SURPRISING = 5; // nats of the strongest colour
const CHANGED = 3; // nats that a token got better or worse, of the strongest colour
const CHUNK = 2000; // tokens that are made at a time; a chunk ends with a line

export function tokenView(tokens, data, status, onselect, wanted) {
  const spans = new Map(); // position: its spans, one a side
  const segmentAt = (position) => data.segments.find((segment) => segment.start <= position && position < segment.end);
  const checkpoints = Object.keys(tokens.scores);
  const pair = [checkpoints[0], checkpoints.at(-1)];
  const choices = { ...COLOURINGS, ...Object.fromEntries(checkpoints.map((name) => [`ce ${name}`, `surprise of ${name}`])), ...(checkpoints.length > 1 ? { change: `better or worse, ${pair.join(" to ")}` } : {}) };
  const strongest = { policy: largest(tokens.policy), world: largest(tokens.world) };
  let colouring = wanted in choices ? wanted : "role";
  let pinned = null;
  let sides = false;

  function strength(position, how) {
    if (how === "logprob") return tokens.logprobs[position] === null ? null : Math.min(1, -tokens.logprobs[position] / SURPRISING);
    if (how === "change") return limited((tokens.scores[pair[1]].logprobs[position] - tokens.scores[pair[0]].logprobs[position]) / CHANGED);
    if (how.startsWith("ce ")) return limited(-tokens.scores[how.slice(3)].logprobs[position] / SURPRISING);
    const column = tokens[how];
    return column && column[position] ? column[position] / strongest[how] : null;
  }

  function paint(span, position) {
    const how = span.side ? `ce ${span.side}` : colouring;
    const value = how === "role" ? null : strength(position, how);
    span.classList.toggle("shaded", how !== "role");
    span.style.setProperty("--strength", value === null ? "0" : String(Math.round(Math.abs(value) * 100)));
    span.classList.toggle("negative", value !== null && (how.startsWith("ce ") ? value > 0 : value < 0));
  }

  function token(position, segment, side) {
    const policy = tokens.policy?.[position] || 0;
    const world = tokens.world?.[position] || 0;
    const trained = policy ? (policy > 0 ? "up" : "down") : world ? "learned" : "";
    const text = tokens.texts[position];
    const span = h("span", { class: `token role-${segment.role} ${trained}` }, text === "" ? h("span", { class: "hidden-char" }, "·") : withNewlines(text));
    span.position = position;
    span.side = side;
    spans.set(position, [...(spans.get(position) || []), span]);
    if (position === pinned) span.classList.add("pinned");
    paint(span, position);
    return span;
  }

  const fact = (name, value) => h("span", { class: "token-fact" }, h("span", { class: "token-name" }, name), " ", value);
  const share = (logprob) => `${number(100 * Math.exp(logprob), 3)} %`;

  function describe(position) {
    const segment = segmentAt(position);
    const logprob = tokens.logprobs[position];
    return [
      fact("token", h("code", {}, visible(JSON.stringify(tokens.texts[position])))), fact("id", String(tokens.ids[position])), fact("at", `${position}`),
      h("span", { class: `role role-${segment.role}` }, segment.role), segment.turn === null ? null : fact("turn", String(segment.turn)), segment.tool ? fact("tool", segment.tool) : null,
      segment.role === "ACTION" ? fact("logprob", logprob === null ? "not sampled" : `${number(logprob, 4)} (${share(logprob)})`) : null,
      tokens.policy ? fact("policy weight", tokens.policy[position] ? signed(tokens.policy[position]) : "0") : fact("weights", "no step was trained on it"),
      tokens.world ? fact("world weight", tokens.world[position] ? signed(tokens.world[position]) : "0") : null,
      checkpoints.map((name) => scored(name, position)),
    ];
  }

  // What a checkpoint made of a token: its cross-entropy, and what was likelier.
  function scored(name, position) {
    const { logprobs, expected } = tokens.scores[name];
    const likelier = (expected[position] || []).map(([text, logprob], index) => [index ? ", " : "", h("code", {}, visible(JSON.stringify(text))), ` ${share(logprob)}`]);
    return h("span", { class: "token-fact scored" }, h("span", { class: "token-name" }, name), ` cross-entropy ${number(-logprobs[position], 4)} nats (${share(logprobs[position])}), `, likelier.length ? ["expected ", likelier] : "the likeliest");
  }

  const numbers = h("div", { class: "token-numbers" });
  const choice = h("select", { "aria-label": "What colours mean", onchange: (event) => {
    colouring = event.target.value;
    change({ colour: colouring === "role" ? null : colouring });
    for (const [position, made] of spans) for (const span of made) paint(span, position);
  } }, Object.entries(choices).map(([name, title]) => h("option", { value: name, disabled: name in strongest && !strongest[name], selected: name === colouring }, title)));
  replace(status, numbers, h("label", { class: "colouring" }, "colour ", choice));
  hint();

  function hint() { replace(numbers, h("span", { class: "muted" }, "Point at a token, or click it and move with ← →. Underlined: trained on; solid makes it likelier, dotted less likely.")); }
  function select(position, scroll = false) {
    for (const span of spans.get(pinned) || []) span.classList.remove("pinned");
    for (const chunk of position === null ? [] : chunks.filter((pre) => pre.isConnected && pre.start <= position && position < pre.end)) fill(chunk);
    pinned = position !== null && spans.has(position) ? position : null;
    onselect(pinned);
    if (pinned === null) return hint();
    const [span] = spans.get(pinned);
    for (const each of spans.get(pinned)) each.classList.add("pinned");
    replace(numbers, describe(pinned));
    // Blocks that come into the window get their height only then, so the place is looked for again.
    for (const wait of scroll ? [0, 60, 300] : []) setTimeout(() => pinned === position && span.scrollIntoView({ block: "nearest" }), wait);
  }

  // A chunk gets its tokens when it comes near the window, or when one of them is selected.
  let chunks = [];
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && fill(entry.target)), { rootMargin: "1200px" });

  function fill(pre) {
    near.unobserve(pre);
    if (pre.hasChildNodes()) return;
    for (let position = pre.start; position < pre.end; position++) pre.append(token(position, segmentAt(position), pre.side));
    pre.style.minHeight = "";
  }

  function chunk(start, end, side) {
    const pre = h("pre", { class: "tokens" });
    Object.assign(pre, { start, end, side });
    pre.style.minHeight = `${Math.ceil((end - start) / (side ? 7 : 14)) * 23}px`;
    chunks.push(pre);
    near.observe(pre);
    pre.addEventListener("mouseover", (event) => { const span = event.target.closest(".token"); if (span && pinned === null) replace(numbers, describe(span.position)); });
    pre.addEventListener("mouseleave", () => { if (pinned === null) hint(); });
    pre.addEventListener("click", (event) => { const span = event.target.closest(".token"); if (span) select(span.position === pinned ? null : span.position); });
    return pre;
  }

  function column(first, last, side) {
    const made = [];
    for (let start = first; start < last; ) {
      let end = Math.min(last, start + CHUNK);
      while (end < last && !tokens.texts[end - 1].includes("\n") && end < start + 2 * CHUNK) end += 1;
      made.push(chunk(start, end, side));
      start = end;
    }
    return made;
  }

  function render(segments) {
    const [first, last] = [segments[0].start, segments.at(-1).end];
    if (!sides) return column(first, last, null);
    return h("div", { class: "sides" }, pair.map((name) => h("div", { role: "group", "aria-label": name }, h("div", { class: "side-name" }, name), column(first, last, name))));
  }

  function setSides(on) {
    sides = on && checkpoints.length > 1;
    chunks.forEach((pre) => near.unobserve(pre));
    chunks = [];
    spans.clear();
  }

  return { render, select, setSides, selected: () => pinned, move: (step) => select(Math.min(tokens.ids.length - 1, Math.max(0, (pinned ?? -1) + step)), true) };
}

const largest = (column) => (column || []).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const limited = (value) => Math.min(1, Math.max(-1, value));

function withNewlines(text) {
  return text.split(/(\n)/).map((part) => (part === "\n" ? [h("span", { class: "newline", "aria-hidden": "true" }, "↵"), "\n"] : visible(part)));
}

// Every token: its role as a colour, whether it was trained as an underline, all its numbers below the page.

import { h, number, replace, signed, visible } from "./dom.js";

const COLOURINGS = { role: "who made it", policy: "policy weight", world: "world weight", logprob: "log-probability" };

export function tokenView(tokens, data, status, onselect) {
  const spans = new Map();
  const segmentAt = (position) => data.segments.find((segment) => segment.start <= position && position < segment.end);
  let pinned = null;
  let colouring = "role";
  const strongest = { policy: largest(tokens.policy), world: largest(tokens.world) };

  function strength(position) {
    if (colouring === "logprob") return tokens.logprobs[position] === null ? null : Math.min(1, -tokens.logprobs[position] / 5);
    const column = tokens[colouring];
    return column && column[position] ? column[position] / strongest[colouring] : null;
  }

  function paint(span, position) {
    const value = colouring === "role" ? null : strength(position);
    span.classList.toggle("shaded", colouring !== "role");
    span.style.setProperty("--strength", value === null ? "0" : String(Math.round(Math.abs(value) * 100)));
    span.classList.toggle("negative", value !== null && value < 0);
  }

  function token(position, segment) {
    const policy = tokens.policy?.[position] || 0;
    const world = tokens.world?.[position] || 0;
    const trained = policy ? (policy > 0 ? "up" : "down") : world ? "learned" : "";
    const text = tokens.texts[position];
    const span = h("span", { class: `token role-${segment.role} ${trained}` }, text === "" ? h("span", { class: "hidden-char" }, "·") : withNewlines(text));
    span.position = position;
    spans.set(position, span);
    paint(span, position);
    return span;
  }

  function describe(position) {
    const segment = segmentAt(position);
    const logprob = tokens.logprobs[position];
    const fact = (name, value) => h("span", { class: "token-fact" }, h("span", { class: "token-name" }, name), " ", value);
    return [
      fact("token", h("code", {}, visible(JSON.stringify(tokens.texts[position])))), fact("id", String(tokens.ids[position])), fact("at", `${position}`),
      h("span", { class: `role role-${segment.role}` }, segment.role), segment.turn === null ? null : fact("turn", String(segment.turn)), segment.tool ? fact("tool", segment.tool) : null,
      fact("logprob", logprob === null ? (segment.role === "ACTION" ? "not sampled" : "not recorded") : `${number(logprob, 4)} (${number(100 * Math.exp(logprob), 3)} %)`),
      tokens.policy ? fact("policy weight", tokens.policy[position] ? signed(tokens.policy[position]) : "0") : fact("weights", "no step was trained on it"),
      tokens.world ? fact("world weight", tokens.world[position] ? signed(tokens.world[position]) : "0") : null,
    ];
  }

  const numbers = h("div", { class: "token-numbers" });
  const choice = h("select", { "aria-label": "What colours mean", onchange: (event) => {
    colouring = event.target.value;
    for (const [position, span] of spans) paint(span, position);
  } }, Object.entries(COLOURINGS).map(([name, title]) => h("option", { value: name, disabled: name in strongest && !strongest[name] }, title)));
  replace(status, numbers, h("label", { class: "colouring" }, "colour ", choice));
  hint();

  function hint() { replace(numbers, h("span", { class: "muted" }, "Point at a token, or click it and move with ← →. Underlined: trained on; solid makes it likelier, dotted less likely.")); }
  function select(position, scroll = false) {
    spans.get(pinned)?.classList.remove("pinned");
    const block = position === null ? null : blocks.findLast((pre) => pre.segments[0].start <= position && position < pre.segments.at(-1).end);
    if (block) fill(block);
    pinned = position !== null && spans.has(position) ? position : null;
    onselect(pinned);
    if (pinned === null) return hint();
    const span = spans.get(pinned);
    span.classList.add("pinned");
    replace(numbers, describe(pinned));
    // Blocks that come into the window get their height only then, so the place is looked for again.
    for (const wait of scroll ? [0, 60, 300] : []) setTimeout(() => spans.get(pinned) === span && span.scrollIntoView({ block: "nearest" }), wait);
  }

  // A block gets its tokens when it comes near the window, or when one of them is selected.
  const blocks = [];
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && fill(entry.target)), { rootMargin: "1200px" });

  function fill(pre) {
    near.unobserve(pre);
    if (pre.hasChildNodes()) return;
    pre.append(...pre.segments.flatMap((segment) => Array.from({ length: segment.end - segment.start }, (_, i) => token(segment.start + i, segment))));
    pre.style.minHeight = "";
  }

  function render(segments) {
    const pre = h("pre", { class: "tokens" });
    pre.segments = segments;
    pre.style.minHeight = `${Math.ceil((segments.at(-1).end - segments[0].start) / 14) * 23}px`;
    blocks.push(pre);
    near.observe(pre);
    pre.addEventListener("mouseover", (event) => { const span = event.target.closest(".token"); if (span && pinned === null) replace(numbers, describe(span.position)); });
    pre.addEventListener("mouseleave", () => { if (pinned === null) hint(); });
    pre.addEventListener("click", (event) => { const span = event.target.closest(".token"); if (span) select(span.position === pinned ? null : span.position); });
    return pre;
  }

  return { render, select, selected: () => pinned, move: (step) => select(Math.min(tokens.ids.length - 1, Math.max(0, (pinned ?? -1) + step)), true) };
}

const largest = (column) => (column || []).reduce((most, value) => Math.max(most, Math.abs(value)), 0);

function withNewlines(text) {
  return text.split(/(\n)/).map((part) => (part === "\n" ? [h("span", { class: "newline", "aria-hidden": "true" }, "↵"), "\n"] : visible(part)));
}

// Every token: its role as a colour, whether it was trained as an underline, all its numbers below the page.

import type { Rollout, Segment, Tokens } from "./answers";
import { type Child, entered, h, number, percent, replace, signed, visible } from "./dom";
import { change } from "./state";

const COLOURINGS = {
  role: "who made it",
  policy: "policy weight",
  world: "world weight",
  logprob: "log-probability when sampled",
};
const SURPRISING = 5; // nats of the strongest colour
const CHANGED = 3; // nats that a token got better or worse, of the strongest colour
const CHUNK = 400; // tokens that are made at a time; a chunk ends with a line, where one ends soon
const MOST = 2000; // tokens of a chunk

type Side = string | null; // the checkpoint that a column is of
type Span = HTMLSpanElement & { position: number; side: Side };
type Chunk = HTMLPreElement & { start: number; end: number; side: Side };

export class TokenView {
  private spans = new Map<number, Span[]>(); // by position, one a side
  private chunks: Chunk[] = [];
  private colouring: string;
  private pinned: number | null = null;
  private sides = false;
  private readonly checkpoints: string[];
  private readonly pair: [string, string];
  private readonly strongest: Record<string, number>;
  private readonly numbers = h("div", { class: "token-numbers" });

  // A chunk gets its tokens when it comes near the window, or when one of them is selected.
  private readonly near = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && this.fill(entry.target as Chunk)),
    { rootMargin: "1200px" },
  );

  constructor(
    private readonly tokens: Tokens,
    private readonly data: Rollout,
    status: HTMLElement,
    wanted: string | null,
  ) {
    this.checkpoints = Object.keys(tokens.scores);
    this.pair = [this.checkpoints[0], this.checkpoints.at(-1)!];
    this.strongest = { policy: largest(tokens.policy), world: largest(tokens.world) };
    const choices = this.choices();
    this.colouring = wanted && wanted in choices ? wanted : "role";
    const options = Object.entries(choices).map(([value, title]) => {
      const disabled = value in this.strongest && !this.strongest[value];
      return h("option", { value, disabled, selected: value === this.colouring }, title);
    });
    const choice = h(
      "select",
      { "aria-label": "What colours mean", onchange: (event) => this.recolour(entered(event)) },
      options,
    );
    replace(status, this.numbers, h("label", { class: "colouring" }, "colour ", choice));
    this.hint();
  }

  private choices(): Record<string, string> {
    const surprises = this.checkpoints.map((name) => [`ce ${name}`, `surprise of ${name}`]);
    const compared = this.checkpoints.length > 1 ? { change: `better or worse, ${this.pair.join(" to ")}` } : {};
    return { ...COLOURINGS, ...Object.fromEntries(surprises), ...compared };
  }

  // ---------------------------------------------------------------- colours

  private recolour(colouring: string): void {
    this.colouring = colouring;
    change({ colour: colouring === "role" ? null : colouring });
    for (const made of this.spans.values()) made.forEach((span) => this.paint(span));
  }

  // How strong a token's colour is, from -1 to 1; null where the number is not known.
  private strength(position: number, how: string): number | null {
    const { tokens, pair } = this;
    if (how === "logprob") {
      const logprob = tokens.logprobs[position];
      return logprob === null ? null : limited(-logprob / SURPRISING);
    }
    if (how === "change") {
      const [before, after] = pair.map((name) => tokens.scores[name].logprobs[position]);
      return limited((after - before) / CHANGED);
    }
    if (how.startsWith("ce ")) return limited(-tokens.scores[how.slice(3)].logprobs[position] / SURPRISING);
    const column = how === "policy" ? tokens.policy : tokens.world;
    return column && column[position] ? column[position] / this.strongest[how] : null;
  }

  private paint(span: Span): void {
    const how = span.side ? `ce ${span.side}` : this.colouring;
    span.classList.toggle("shaded", how !== "role");
    if (how === "role") return;
    const value = this.strength(span.position, how);
    span.style.setProperty("--strength", String(Math.round(Math.abs(value ?? 0) * 100)));
    span.classList.toggle("negative", value !== null && (how.startsWith("ce ") ? value > 0 : value < 0));
  }

  // ---------------------------------------------------------------- numbers

  private hint(): void {
    const text =
      "Point at a token, or click it and move with ← →. Underlined: trained on; solid makes it likelier, dotted less likely.";
    replace(this.numbers, h("span", { class: "muted" }, text));
  }

  private describe(position: number): Child[] {
    const { tokens } = this;
    const segment = this.segmentAt(position);
    const logprob = tokens.logprobs[position];
    return [
      fact("token", h("code", {}, visible(JSON.stringify(tokens.texts[position])))),
      fact("id", String(tokens.ids[position])),
      fact("at", String(position)),
      h("span", { class: `role role-${segment.role}` }, segment.role),
      segment.turn === null ? null : fact("turn", String(segment.turn)),
      segment.tool ? fact("tool", segment.tool) : null,
      segment.role === "ACTION"
        ? fact("logprob", logprob === null ? "not sampled" : `${number(logprob, 4)} (${percent(Math.exp(logprob))})`)
        : null,
      tokens.policy
        ? fact("policy weight", tokens.policy[position] ? signed(tokens.policy[position]) : "0")
        : fact("weights", "no step was trained on it"),
      tokens.world ? fact("world weight", tokens.world[position] ? signed(tokens.world[position]) : "0") : null,
      this.checkpoints.map((name) => this.scored(name, position)),
    ];
  }

  // What a checkpoint made of a token: its cross-entropy, and what was likelier.
  private scored(name: string, position: number): Child {
    const { logprobs, expected } = this.tokens.scores[name];
    const likelier = (expected[position] || []).map(([text, logprob], index) => {
      return [index ? ", " : "", h("code", {}, visible(JSON.stringify(text))), ` ${percent(Math.exp(logprob))}`];
    });
    return h(
      "span",
      { class: "token-fact scored" },
      h("span", { class: "token-name" }, name),
      ` cross-entropy ${number(-logprobs[position], 4)} nats (${percent(Math.exp(logprobs[position]))}), `,
      likelier.length ? ["expected ", likelier] : "the likeliest",
    );
  }

  private segmentAt(position: number): Segment {
    return this.data.segments.find((segment) => segment.start <= position && position < segment.end)!;
  }

  // ---------------------------------------------------------------- selecting

  get selected(): number | null {
    return this.pinned;
  }

  move(step: number): void {
    this.select(Math.min(this.tokens.ids.length - 1, Math.max(0, (this.pinned ?? -1) + step)), true);
  }

  select(position: number | null, scroll = false): void {
    if (this.pinned !== null) this.spans.get(this.pinned)?.forEach((span) => span.classList.remove("pinned"));
    if (position !== null) {
      this.chunks
        .filter((chunk) => chunk.start <= position && position < chunk.end)
        .forEach((chunk) => this.fill(chunk));
    }
    const spans = position === null ? undefined : this.spans.get(position);
    this.pinned = spans ? position : null;
    change({ pos: this.pinned });
    if (position === null || !spans) return this.hint();
    spans.forEach((span) => span.classList.add("pinned"));
    replace(this.numbers, this.describe(position));
    // Blocks that come into the window get their height only then, so the place is looked for again.
    const look = () => this.pinned === position && spans[0].scrollIntoView({ block: "nearest" });
    for (const wait of scroll ? [0, 60, 300] : []) setTimeout(look, wait);
  }

  // ---------------------------------------------------------------- elements

  setSides(on: boolean): void {
    this.sides = on && this.checkpoints.length > 1;
    this.near.disconnect();
    this.chunks = [];
    this.spans.clear();
  }

  // The tokens of segments that follow each other; twice, beside each other, before and after.
  render = (segments: Segment[]): Child => {
    const [first, last] = [segments[0].start, segments.at(-1)!.end];
    if (!this.sides) return this.column(first, last, null);
    const sides = this.pair.map((name) => {
      const title = h("div", { class: "side-name" }, name);
      return h("div", { role: "group", "aria-label": name }, title, this.column(first, last, name));
    });
    return h("div", { class: "sides" }, sides);
  };

  private column(first: number, last: number, side: Side): Chunk[] {
    const made: Chunk[] = [];
    for (let start = first; start < last;) {
      let end = Math.min(last, start + CHUNK);
      while (end < last && !this.tokens.texts[end - 1].includes("\n") && end < start + MOST) end += 1;
      made.push(this.chunk(start, end, side));
      start = end;
    }
    return made;
  }

  private chunk(start: number, end: number, side: Side): Chunk {
    const chunk: Chunk = Object.assign(h("pre", { class: "tokens" }), { start, end, side });
    chunk.style.minHeight = `${Math.ceil((end - start) / (side ? 7 : 14)) * 23}px`;
    this.chunks.push(chunk);
    this.near.observe(chunk);
    const spanOf = (event: Event) => (event.target as Element).closest<Span>(".token");
    chunk.addEventListener("mouseover", (event) => {
      const span = spanOf(event);
      if (span && this.pinned === null) replace(this.numbers, this.describe(span.position));
    });
    chunk.addEventListener("mouseleave", () => {
      if (this.pinned === null) this.hint();
    });
    chunk.addEventListener("click", (event) => {
      const span = spanOf(event);
      if (span) this.select(span.position === this.pinned ? null : span.position);
    });
    return chunk;
  }

  private fill(chunk: Chunk): void {
    this.near.unobserve(chunk);
    if (chunk.hasChildNodes()) return;
    let segment = this.segmentAt(chunk.start);
    const made: Span[] = [];
    for (let position = chunk.start; position < chunk.end; position++) {
      if (position >= segment.end) segment = this.segmentAt(position);
      made.push(this.token(position, segment, chunk.side));
    }
    chunk.append(...made);
    chunk.style.minHeight = "";
  }

  private token(position: number, segment: Segment, side: Side): Span {
    const policy = this.tokens.policy?.[position] || 0;
    const world = this.tokens.world?.[position] || 0;
    const trained = policy ? (policy > 0 ? "up" : "down") : world ? "learned" : "";
    const text = this.tokens.texts[position];
    const shown = text === "" ? h("span", { class: "hidden-char" }, "·") : withNewlines(text);
    const made = h("span", { class: `token role-${segment.role} ${trained}` }, shown);
    const span: Span = Object.assign(made, { position, side });
    this.spans.set(position, [...(this.spans.get(position) || []), span]);
    if (position === this.pinned) span.classList.add("pinned");
    this.paint(span);
    return span;
  }
}

const fact = (name: string, value: Child) => {
  return h("span", { class: "token-fact" }, h("span", { class: "token-name" }, name), " ", value);
};
const largest = (column: number[] | null) => (column || []).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const limited = (value: number) => Math.min(1, Math.max(-1, value));

function withNewlines(text: string): Child[] {
  const parts = text.split(/(\n)/);
  return parts.map((part) => {
    return part === "\n" ? [h("span", { class: "newline", "aria-hidden": "true" }, "↵"), "\n"] : visible(part);
  });
}

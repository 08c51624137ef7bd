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
const CHUNK = 150; // tokens that are made at a time; a chunk ends with a line, where one ends soon
const MOST = 300; // tokens of a chunk; in longer lines it ends within one, and the next begins a line without a ↵
const A_FRAME = 300; // tokens that are made in one frame
const PLAIN = /^[\x20-\x7e\u00a0-\u02ff]+$/; // text in which nothing is hidden

type Side = string | null; // the checkpoint that a column is of
type Chunk = HTMLPreElement & { start: number; end: number; side: Side };

export class TokenView {
  private chunks: Chunk[] = [];
  private readonly waiting = new Set<Chunk>(); // near the window, and without tokens
  private colouring: string;
  private pinned: number | null = null;
  private sides = false;
  private readonly checkpoints: string[];
  private readonly pair: [string, string];
  private readonly strongest: Record<string, number>;
  private readonly numbers = h("div", { class: "token-numbers" });

  // A chunk has its tokens while it is near the window, or while one of them is selected.
  private readonly near = new IntersectionObserver((entries) => this.look(entries), { rootMargin: "1200px" });

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
    for (const chunk of this.chunks) {
      spansOf(chunk).forEach((span, index) => this.paint(span, chunk.start + index, chunk.side));
    }
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

  private paint(span: HTMLElement, position: number, side: Side): void {
    const how = side ? `ce ${side}` : this.colouring;
    span.classList.toggle("shaded", how !== "role");
    if (how === "role") return;
    const value = this.strength(position, how);
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
    if (this.pinned !== null) this.spansAt(this.pinned).forEach((span) => span.classList.remove("pinned"));
    const spans = position === null ? [] : this.spansAt(position);
    this.pinned = spans.length ? position : null;
    change({ pos: this.pinned });
    if (position === null || !spans.length) return this.hint();
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
    this.waiting.clear();
    this.chunks = [];
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
    chunk.style.height = `${Math.ceil((end - start) / (side ? 7 : 14)) * 23}px`; // until it has its tokens
    this.chunks.push(chunk);
    this.near.observe(chunk);
    chunk.addEventListener("mouseover", this.point);
    chunk.addEventListener("mouseleave", this.leave);
    chunk.addEventListener("click", this.click);
    return chunk;
  }

  private readonly point = (event: Event): void => {
    const position = positionOf(event);
    if (position !== null && this.pinned === null) replace(this.numbers, this.describe(position));
  };

  private readonly leave = (): void => {
    if (this.pinned === null) this.hint();
  };

  private readonly click = (event: Event): void => {
    const position = positionOf(event);
    if (position !== null) this.select(position === this.pinned ? null : position);
  };

  // ---------------------------------------------------------------- what is near the window

  // A frame makes a few chunks, those in the window first; what is far away is let go.
  private look(entries: IntersectionObserverEntry[]): void {
    const before = this.waiting.size;
    for (const { target, isIntersecting, boundingClientRect: at } of entries) {
      if (isIntersecting) this.waiting.add(target as Chunk);
      else this.empty(target as Chunk, at.height);
    }
    if (this.waiting.size && !before) requestAnimationFrame(this.goOn);
  }

  private readonly goOn = (): void => {
    const away = (chunk: Chunk) => {
      const { top, bottom } = chunk.getBoundingClientRect();
      return Math.max(0, top - window.innerHeight, -bottom);
    };
    const nearest = [...this.waiting].map((chunk) => ({ chunk, away: away(chunk) })).sort((a, b) => a.away - b.away);
    let made = 0;
    for (const { chunk } of nearest) {
      made += chunk.end - chunk.start;
      if (made > A_FRAME) break;
      this.fill(chunk);
    }
    if (this.waiting.size) requestAnimationFrame(this.goOn);
  };

  private fill(chunk: Chunk): void {
    this.waiting.delete(chunk);
    if (chunk.hasChildNodes()) return;
    let segment = this.segmentAt(chunk.start);
    const made: HTMLElement[] = [];
    for (let position = chunk.start; position < chunk.end; position++) {
      if (position >= segment.end) segment = this.segmentAt(position);
      made.push(this.token(position, segment, chunk.side));
    }
    chunk.append(...made);
    chunk.style.height = "";
  }

  // What is selected stays: a token, or text to copy.
  private empty(chunk: Chunk, height: number): void {
    this.waiting.delete(chunk);
    const isPinned = this.pinned !== null && chunk.start <= this.pinned && this.pinned < chunk.end;
    const marked = getSelection();
    const isMarked = marked !== null && !marked.isCollapsed && marked.containsNode(chunk, true);
    if (!chunk.hasChildNodes() || isPinned || isMarked) return;
    chunk.style.height = `${height}px`;
    chunk.replaceChildren();
  }

  // The elements of a token, one a side.
  private spansAt(position: number): HTMLElement[] {
    const chunks = this.chunks.filter((chunk) => chunk.start <= position && position < chunk.end);
    for (const chunk of chunks) this.fill(chunk);
    return chunks.map((chunk) => spansOf(chunk)[position - chunk.start]);
  }

  private token(position: number, segment: Segment, side: Side): HTMLElement {
    const policy = this.tokens.policy?.[position] || 0;
    const world = this.tokens.world?.[position] || 0;
    const trained = policy ? (policy > 0 ? "up" : "down") : world ? "learned" : "";
    const text = this.tokens.texts[position];
    const span = document.createElement("span");
    span.className = `token role-${segment.role} ${trained}`;
    if (PLAIN.test(text)) span.textContent = text;
    else replace(span, text === "" ? h("span", { class: "hidden-char" }, "·") : withNewlines(text));
    if (position === this.pinned) span.classList.add("pinned");
    this.paint(span, position, side);
    return span;
  }
}

const spansOf = (chunk: Chunk) => [...chunk.children] as HTMLElement[]; // one a token, in their order

// The position of the token that an event is on.
function positionOf(event: Event): number | null {
  const span = (event.target as Element).closest(".token");
  return span && (event.currentTarget as Chunk).start + [...span.parentElement!.children].indexOf(span);
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

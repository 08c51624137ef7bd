// All rollouts as a table: conditions and words in one line, sorting by any column, rows made only where one looks.

import type { Maybe, Row, Table } from "./answers";
import { ask } from "./api";
import { announce, type Child, h, number, plural, replace, signed, swatch, visible } from "./dom";
import { type Context, change, go, link, type Page, read } from "./state";

const ROW_PX = 36;
const FOUND_PX = 60; // of a row with the text that was found
const PAGE = 100; // rows of one question
const AROUND = 8; // rows that are made above and below the window
const TYPED_MS = 250; // after the last key, before the question is asked
const WAIT_MS = 50; // before the files left are asked for
const MOST_PROBLEMS = 50;
const COLUMNS = {
  step: "step",
  run: "run", // where there are several
  task: "task",
  group: "group",
  reward: "reward",
  advantage: "advantage",
  stop: "ended",
  turns: "turns",
  tokens: "tokens",
  invalid: "invalid",
  surprise: "surprise",
  confused: "confused",
};
type Column = keyof typeof COLUMNS;
const NAMES = Object.keys(COLUMNS) as Column[];
const HELP = 'reward<1   stop:max_turns   surprise>2   step:10..20   kind:eval   failed   "text that was said"';
const NOTHING: Table = { total: 0, rows: [], pending: 0, problems: [], means: {}, stops: {} };

const addressOf = ({ run, part, row }: Row) => link("rollout", { run, part, row });
const groupOf = ({ run, part, group }: Row) => ({ run, part, group });

export async function rollouts(main: HTMLElement, params: URLSearchParams, context: Context): Promise<Page> {
  const made = new Rollouts(main, params, context);
  await made.load();
  return made.page();
}

class Rollouts {
  private q: string;
  private sort: string;
  private order: string;
  private pages = new Map<number, Row[]>();
  private filling = false; // a page is asked for
  private answer = NOTHING;
  private here = -1; // the row that keys move
  private asking = 0; // number of the last question that began anew

  private readonly input: HTMLInputElement;
  private readonly summary = h("p", { class: "summary", role: "status" });
  private readonly problems = h("div");
  private readonly heads = h("div", { class: "row heads", role: "row" });
  private readonly space = h("div", { class: "space", role: "rowgroup" });
  private readonly chips = h("div", { class: "chips" });
  private readonly scroller: HTMLElement;
  private readonly resized = new ResizeObserver(() => this.drawRows());

  constructor(
    main: HTMLElement,
    params: URLSearchParams,
    private readonly context: Context,
  ) {
    this.q = params.get("q") || "";
    this.sort = params.get("sort") || "step";
    this.order = params.get("order") || "desc";
    this.input = h("input", {
      type: "search",
      value: this.q,
      placeholder: HELP,
      "aria-label": "Conditions and words to search for",
      spellcheck: "false",
      autocomplete: "off",
    });
    const table = { class: "scroller", role: "table", "aria-label": "Rollouts", tabindex: "0" };
    this.scroller = h("div", table, this.heads, this.space);
    const filter = h("div", { class: "filter" }, this.input, this.chips);
    const title = h("h1", { class: "unseen" }, "Rollouts");
    replace(main, h("div", { class: "table-page" }, title, filter, this.summary, this.problems, this.scroller));
    this.listen();
    this.draw();
  }

  page(): Page {
    const move = (step: number) => () => this.move(step);
    return {
      keys: {
        "/": () => {
          this.input.focus();
          this.input.setSelectionRange(this.input.value.length, this.input.value.length);
        },
        j: move(1),
        k: move(-1),
        ArrowDown: move(1),
        ArrowUp: move(-1),
        Enter: () => this.open(this.here),
        s: () => {
          const row = this.rowAt(this.here);
          if (row) go("group", groupOf(row));
        },
      },
      refresh: () => this.load(true),
      close: () => {
        this.asking += 1;
        this.resized.disconnect();
      },
    };
  }

  private listen(): void {
    let typed = 0;
    this.input.addEventListener("input", () => {
      clearTimeout(typed);
      typed = window.setTimeout(() => this.find(this.input.value), TYPED_MS);
    });
    this.input.addEventListener("keydown", ({ key }) => {
      if (key !== "Enter") return;
      this.input.blur();
      this.scroller.focus();
    });
    this.scroller.addEventListener("scroll", () => requestAnimationFrame(() => this.drawRows()), { passive: true });
    this.resized.observe(this.scroller);
  }

  // ---------------------------------------------------------------- questions

  private question(offset: number): Promise<Table> {
    const { q, sort, order } = this;
    return ask("rollouts", { q, sort, order, offset, limit: PAGE, runs: this.context.asked() });
  }

  async load(keep = false): Promise<void> {
    const mine = ++this.asking;
    this.scroller.ariaBusy = "true";
    const first = await this.question(0);
    if (mine !== this.asking) return;
    this.answer = first;
    if (!keep) {
      this.here = -1;
      this.scroller.scrollTop = 0;
    }
    this.pages = new Map([[0, first.rows]]);
    this.draw();
    if (first.pending) setTimeout(() => mine === this.asking && this.load(true), WAIT_MS);
    else this.scroller.ariaBusy = "false";
  }

  // One page is asked for at a time, the first that is missing in the window: those scrolled past are never asked for.
  private async fill(page: number): Promise<void> {
    if (this.filling) return;
    this.filling = true;
    const mine = this.asking;
    try {
      const { rows } = await this.question(page * PAGE);
      if (mine === this.asking) this.pages.set(page, rows);
    } finally {
      this.filling = false;
    }
    this.drawRows();
  }

  private rowAt(index: number): Row | undefined {
    return this.pages.get(Math.floor(index / PAGE))?.[index % PAGE];
  }

  private find(text: string): void {
    this.q = text;
    if (this.input.value !== text) this.input.value = text;
    change({ q: text });
    this.load();
  }

  private sortBy(name: string): void {
    this.order = this.sort === name && this.order === "desc" ? "asc" : "desc";
    this.sort = name;
    change({ sort: name, order: this.order });
    this.load();
  }

  // ---------------------------------------------------------------- rows

  private get rowPx(): number {
    return wordsOf(this.q).length ? FOUND_PX : ROW_PX;
  }

  private drawRows(): void {
    const px = this.rowPx;
    const top = Math.max(0, this.scroller.scrollTop - this.heads.offsetHeight);
    const from = Math.max(0, Math.floor(top / px) - AROUND);
    const to = Math.min(this.answer.total, Math.ceil((top + this.scroller.clientHeight) / px) + AROUND);
    const names = this.names();
    const rows: Child[] = [];
    let missing: number | undefined;
    for (let index = from; index < to; index++) {
      const page = Math.floor(index / PAGE);
      if (!this.pages.has(page)) missing ??= page;
      rows.push(this.drawRow(index, px, names));
    }
    if (missing !== undefined) this.fill(missing);
    this.space.style.height = `${this.answer.total * px}px`;
    this.scroller.setAttribute("aria-rowcount", String(this.answer.total + 1));
    replace(this.space, rows);
  }

  private names(): Column[] {
    const several = this.context.selected(read().params).length > 1;
    return several ? NAMES : NAMES.filter((name) => name !== "run");
  }

  private drawRow(index: number, px: number, names: Column[]): HTMLElement {
    const row = this.rowAt(index);
    const classes = ["row", px === FOUND_PX && "tall", index === this.here && "here", !row && "waiting"];
    const props = {
      class: classes.filter(Boolean).join(" "),
      role: "row",
      "aria-rowindex": String(index + 2),
      style: { top: `${index * px}px` },
    };
    if (!row) return h("div", props);
    const onclick = (event: MouseEvent) => (event.target as Element).closest("a") || this.open(index);
    const cells = names.map((name) => cell(row, name, this.context));
    const found = row.snippet ? h("span", { class: "snippet", role: "cell" }, this.marked(row.snippet)) : null;
    return h("div", { ...props, onclick }, cells, found);
  }

  // A text with the words that were searched for marked.
  private marked(text: string): Child[] {
    const words = wordsOf(this.q).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (!words.length) return visible(text);
    const parts = text.split(new RegExp(`(${words.join("|")})`, "gi"));
    return parts.map((part, index) => (index % 2 ? h("mark", {}, visible(part)) : visible(part)));
  }

  private open(index: number): void {
    const row = this.rowAt(index);
    if (!row) return;
    try {
      const known = [...this.pages].sort(([a], [b]) => a - b).flatMap(([, rows]) => rows);
      sessionStorage.setItem("order", JSON.stringify(known.map(({ run, part, row }) => ({ run, part, row }))));
      sessionStorage.setItem("table", location.hash);
    } catch {
      announce("[ and ] do nothing: the browser keeps no storage for this page");
    }
    location.hash = addressOf(row);
  }

  private move(step: number): void {
    this.here = Math.min(this.answer.total - 1, Math.max(0, this.here + step));
    const px = this.rowPx;
    const top = this.here * px;
    const end = top + px + this.heads.offsetHeight;
    const { scroller } = this;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (end > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = end - scroller.clientHeight;
    this.drawRows();
  }

  // ---------------------------------------------------------------- around the rows

  private draw(): void {
    const names = this.names();
    this.scroller.classList.toggle("several", names.includes("run"));
    replace(
      this.heads,
      names.map((name) => this.head(name)),
    );
    const { total, means, pending, problems } = this.answer;
    const facts = [plural(total, "rollout")];
    if (total)
      facts.push(
        `mean reward ${number(means.reward)}`,
        `${number(means.turns)} turns`,
        `${number(means.tokens)} tokens`,
      );
    if (pending) facts.push(`${plural(pending, "file")} still to read`);
    this.summary.textContent = facts.join(" · ");
    const list = problems.slice(0, MOST_PROBLEMS).map((text) => h("li", {}, visible(text)));
    const title = h("summary", {}, `${plural(problems.length, "record")} could not be read`);
    replace(this.problems, problems.length ? h("details", { class: "notice" }, title, h("ul", {}, list)) : null);
    this.drawChips();
    this.drawRows();
  }

  private head(name: Column): HTMLElement {
    const descending = this.order === "desc";
    const sorted = this.sort === name ? (descending ? "descending" : "ascending") : "none";
    const arrow = this.sort === name ? h("span", { "aria-hidden": "true" }, descending ? " ↓" : " ↑") : null;
    const button = h("button", { onclick: () => this.sortBy(name) }, COLUMNS[name], arrow);
    return h("span", { class: `cell cell-${name}`, role: "columnheader", "aria-sort": sorted }, button);
  }

  private drawChips(): void {
    const terms = this.q.split(/\s+/);
    const chip = (text: string, term: string) => {
      const on = terms.includes(term);
      const next = on ? terms.filter((part) => part !== term).join(" ") : `${this.q} ${term}`.trim();
      return h("button", { class: "chip", "aria-pressed": String(on), onclick: () => this.find(next) }, text);
    };
    const counts = Object.entries(this.answer.stops).sort(([, a], [, b]) => b - a);
    const stops = counts.map(([stop, count]) => chip(`${stop.replace("_", " ")} ${number(count)}`, `stop:${stop}`));
    const several = stops.length > 1 || this.q.includes("stop:");
    replace(
      this.chips,
      chip("training", "kind:train"),
      chip("evaluation", "kind:eval"),
      several ? stops : null,
      chip("invalid calls", "invalid>0"),
    );
  }
}

function cell(row: Row, name: Column, context: Context): HTMLElement {
  const plain = (content: Child, className = "", title: string | null = null) => {
    return h("span", { class: `cell cell-${name} ${className}`.trim(), role: "cell", title }, content);
  };
  switch (name) {
    case "run":
      return plain([swatch(context.colours.get(row.run)!), visible(row.run)], "", row.run);
    case "task":
      return plain(h("a", { href: addressOf(row), tabindex: "-1", title: row.task }, visible(row.task)));
    case "step":
      return plain([number(row.step), row.kind === "eval" ? h("span", { class: "kind" }, "eval") : null]);
    case "group": {
      const href = link("group", groupOf(row));
      return plain(h("a", { class: "quiet", href, title: "side by side" }, number(row.group)));
    }
    case "stop": {
      const { failure } = row;
      if (!failure) return plain(row.stop.replace("_", " "));
      return plain(failure.error, "bad", `${failure.phase}: ${failure.error}: ${failure.message}`);
    }
    case "reward":
      return plain([bar(row.reward), number(row.reward)]);
    case "advantage":
      return plain(signed(row.advantage));
    case "invalid":
    case "confused":
      return plain(number(row[name]), row[name] ? "warn" : "");
    default:
      return plain(number(row[name]));
  }
}

function bar(reward: Maybe): Child {
  if (reward === null) return null;
  const width = `${Math.round(100 * Math.min(1, Math.max(0, reward)))}%`;
  return h("span", { class: "reward-bar", "aria-hidden": "true" }, h("span", { style: { width } }));
}

// The words of a query, apart from its conditions.
function wordsOf(query: string): string[] {
  const terms = [...query.matchAll(/"([^"]*)"?|(\S+)/g)];
  const words = terms.filter(([, quoted, bare]) => quoted !== undefined || !/^[a-z_]+(:|<=|>=|!=|=|<|>)/.test(bare));
  return words.map(([, quoted, bare]) => quoted ?? bare).filter((word) => word && word !== "failed");
}

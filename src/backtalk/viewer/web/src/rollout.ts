// One rollout as a conversation, and every token of it with its role, weight in the loss and log-probability.

import type { Rollout, Row } from "./answers";
import { ask } from "./api";
import { conversation } from "./conversation";
import { announce, type Child, copy, h, replace } from "./dom";
import { audit, back, groupLink, heading, legend, siblings, stats, surprises } from "./facts";
import { change, type Context, link, type Page, read } from "./state";
import { TokenView } from "./tokens";

const OPTIONS = {
  tokens: ["tokens", "t"],
  sides: ["before and after", "b"],
  template: ["template", "m"],
  raw: ["raw", "r"],
};
type Option = keyof typeof OPTIONS;
type Place = Pick<Row, "run" | "part" | "row">;

export async function rollout(main: HTMLElement, params: URLSearchParams, _: Context): Promise<Page> {
  const which = { run: params.get("run"), part: params.get("part"), row: params.get("row") };
  const made = new Opened(main, params, which, await ask("rollout", which));
  await made.draw();
  return made.page();
}

// Draw this page again, as the address now says.
const again = () => window.dispatchEvent(new HashChangeEvent("hashchange"));

function jump(position: number): void {
  change({ tokens: true, pos: position });
  again();
}

class Opened {
  private readonly options: Record<Option, boolean>;
  private readonly isCompared: boolean; // by two checkpoints
  private readonly talk = h("div", { class: "talk" });
  private readonly tools: HTMLElement;
  private readonly status = h("div", { class: "token-status", role: "status", "aria-live": "polite", hidden: true });
  private view: TokenView | null = null;

  constructor(
    main: HTMLElement,
    private readonly params: URLSearchParams,
    private readonly which: { run: string | null; part: string | null; row: string | null },
    private readonly data: Rollout,
  ) {
    const has = (name: Option) => params.has(name);
    this.options = { tokens: has("tokens"), sides: has("sides"), template: has("template"), raw: has("raw") };
    this.isCompared = Object.keys(data.surprises).length > 1;
    this.tools = this.toolbar();
    const left = h("div", { class: "rollout-main" }, heading(data), siblings(data), notes(data), this.tools, this.talk);
    const right = h(
      "div",
      { class: "rollout-side" },
      surprises(data, jump),
      legend(data),
      audit(data, jump),
      stats(data),
    );
    replace(main, h("div", { class: "rollout" }, left, right), this.status);
    main.scrollTop = 0;
  }

  private toolbar(): HTMLElement {
    const names = (Object.keys(OPTIONS) as Option[]).filter((name) => name !== "sides" || this.isCompared);
    const button = (title: string, key: string, props: object) => h("button", { ...props }, title, h("kbd", {}, key));
    const about = "as a file that backtalk view, account and import read";
    return h(
      "div",
      { class: "tools", role: "toolbar", "aria-label": "How it is shown" },
      names.map((name) => {
        const [title, key] = OPTIONS[name];
        return button(title, key, { "data-option": name, onclick: () => this.flip(name) });
      }),
      button("copy JSON", "c", { onclick: () => this.copyRecord() }),
      button("save as a case", "x", { onclick: () => this.saveCase(), title: about }),
    );
  }

  async draw(): Promise<void> {
    const { options } = this;
    if (options.sides) options.tokens = true;
    if (options.tokens && !this.view) {
      this.view = new TokenView(await ask("tokens", this.which), this.data, this.status, this.params.get("colour"));
    }
    this.view?.setSides(options.sides);
    replace(this.talk, conversation(this.data, { ...options, tokens: options.tokens ? this.view!.render : null }));
    this.status.hidden = !options.tokens;
    for (const button of this.tools.querySelectorAll<HTMLElement>("[data-option]")) {
      button.setAttribute("aria-pressed", String(options[button.dataset.option as Option]));
    }
    const position = read().params.get("pos");
    if (options.tokens && position !== null) this.view!.select(Number(position), true);
  }

  private async flip(name: Option): Promise<void> {
    const { options } = this;
    options[name] = !options[name];
    if (name === "tokens" && !options.tokens) options.sides = false;
    change({ ...options, pos: options.tokens ? read().params.get("pos") : null });
    await this.draw();
  }

  // ---------------------------------------------------------------- taking it along

  private async copyRecord(): Promise<void> {
    await copy(JSON.stringify(await ask("record", this.which), null, 1));
  }

  // One line of our own format, so that what went wrong can be looked at, counted and tested elsewhere.
  private async saveCase(): Promise<void> {
    const line = `${JSON.stringify(await ask("record", this.which))}\n`;
    const href = URL.createObjectURL(new Blob([line], { type: "application/jsonl" }));
    const name = `${this.data.task}-${this.data.part}-${this.data.sample}.jsonl`;
    h("a", { href, download: name.replace(/[^\w.-]+/g, "_").replace(/^\.+/, "") }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
    announce("Saved; backtalk view FILE opens it");
  }

  // ---------------------------------------------------------------- keys

  page(): Page {
    const flip = (name: Option) => () => this.flip(name);
    const sideways = (step: number) => () => {
      const { view } = this;
      if (this.options.tokens && view && view.selected !== null) view.move(step);
      else this.open(this.around(this.data.siblings, step));
    };
    return {
      keys: {
        t: flip("tokens"),
        r: flip("raw"),
        m: flip("template"),
        b: () => this.isCompared && this.flip("sides"),
        x: () => this.saveCase(),
        c: () => this.copyRecord(),
        u: () => (location.hash = back()),
        s: () => (location.hash = groupLink(this.data)),
        "[": () => this.inTable(-1),
        "]": () => this.inTable(1),
        j: () => this.turn(1),
        k: () => this.turn(-1),
        ArrowRight: sideways(1),
        ArrowLeft: sideways(-1),
        Escape: () => this.view?.select(null),
      },
      refresh: () => this.refresh(),
    };
  }

  // A step that has trained since has weights to show.
  private async refresh(): Promise<void> {
    if (this.data.trained || this.data.kind !== "train") return;
    if ((await ask("rollout", this.which)).trained) again();
  }

  private around(list: Place[], step: number): Place | undefined {
    const { run, part, row } = this.data;
    return list[list.findIndex((other) => other.run === run && other.part === part && other.row === row) + step];
  }

  private open(place: Place | undefined): void {
    if (!place) return announce("That was the last one");
    const { run, part, row } = place;
    location.hash = link("rollout", { ...Object.fromEntries(read().params), run, part, row, pos: null });
  }

  private inTable(step: number): void {
    try {
      this.open(this.around(JSON.parse(sessionStorage.getItem("order") || "[]"), step));
    } catch {
      announce("No table was open");
    }
  }

  private turn(step: number): void {
    const all = [...this.talk.querySelectorAll(".turn")];
    const isBelow = (px: number) => (turn: Element) => turn.getBoundingClientRect().top > px;
    const here = all.findIndex(isBelow(110));
    const before = all[(here < 0 ? all.length : here) - 2] || all[0];
    const next = step > 0 ? all.find(isBelow(120)) : before;
    next?.scrollIntoView({ block: "start" });
  }
}

function notes(data: Rollout): Child {
  const scored = Object.keys(data.surprises).length > 0;
  const of = `Text was recorded, not tokens. The tokens shown are those of the model ${data.tokens_of}.`;
  const unscored = [
    "No checkpoint has scored these tokens: ",
    h("code", {}, "backtalk score"),
    " does, and then each shows its cross-entropy and what the policy expected.",
  ];
  const unread =
    "The file holds token ids, and no tokenizer is known. Start the viewer with --model NAME to read them.";
  return [
    data.tokens_of ? h("p", { class: "notice" }, of) : null,
    scored || !data.has_text ? null : h("p", { class: "note" }, unscored),
    data.has_text ? null : h("p", { class: "notice" }, unread),
  ];
}

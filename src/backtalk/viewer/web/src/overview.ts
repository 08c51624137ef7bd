// Curves of every metric, runs or arms together; what differs between their settings; what the guard warned of.

import type uPlot from "uplot";
import type { Curves, Interval } from "./answers";
import { ask } from "./api";
import { chart, isKnown, widthOf } from "./charts";
import { type Child, entered, h, number, plural, replace, swatch, table, visible } from "./dom";
import { type Axis, type Drawing, marksOf, metricNames, seriesOf, X } from "./series";
import { type Context, change, type Page, type Params } from "./state";
import { studies } from "./studies";

const SECTIONS: [title: string, fits: RegExp][] = [
  ["Held out", /^held-out /],
  ["Reward", /^(reward|solved|groups_with_signal|length_penalty|no_reward|failed|rollouts)$/],
  ["World model", /_ce(\/|_|$)|^world_model|target_|copied_share|effective_obs|world_pull/],
  ["Behaviour", /turns|invalid|confusion|timeouts|truncated|stop_reason|entropy|retries|unclean|alarms/],
  ["Optimisation", /loss|grad|learning_rate|ratio|clip|kl|update|skipped|gap|stale/],
  ["Tokens and time", /tokens|share|seconds|sequences/],
  ["Other", /(?:)/],
];
const FIRST = (
  "held-out pass_at_1,held-out env_ce_recorded,reward,solved,env_output_ce,env_output_ce_new,world_model_coeff," +
  "num_turns,invalid_calls,entropy,grad_norm,world_grad_share"
).split(",");
const TITLES: Record<string, string> = {
  "held-out pass_at_1": "pass@1",
  "held-out pass_at_k": "pass@k",
  "held-out reward": "reward",
  "held-out env_ce_recorded": "cross-entropy, recorded rollouts",
  "held-out env_ce_own": "cross-entropy, own rollouts",
};
const CHART_PX = 168;
const MOST_TILES = 6;
const PATIENCE_MS = 1000; // between drawings of what has come
const AT_ONCE = 4; // runs that are asked for

const rank = (name: string) => FIRST.indexOf(name) + 1 || FIRST.length + 1;
const titleOf = (name: string) => TITLES[name] || name;

interface State extends Drawing {
  log: boolean;
  find: string;
  zoom: number[]; // from and to, or empty
}

export async function overview(main: HTMLElement, params: URLSearchParams, context: Context): Promise<Page> {
  const isRun = (name: string) => context.sources.some((source) => source.name === name && source.kind === "run");
  const runs = context.selected(params).filter(isRun);
  const made = new Overview(main, params, context, runs);
  await made.load();
  return made.page();
}

class Overview {
  private readonly state: State;
  private readonly hasArms: boolean;
  private readonly controls: HTMLElement;
  private readonly charts = h("div", { class: "charts" });
  private readonly beside = h("div", { class: "beside" });
  private readonly plots = new Map<HTMLElement, uPlot>();
  private readonly group = `sync-${Math.random()}`;
  private readonly left = h("p", { class: "note", role: "status" });
  private curves: Curves[] = [];
  private zooming = false;
  private closed = false;
  private width = 0;

  // A chart is drawn when it comes near the window.
  private readonly seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting && !this.plots.has(target as HTMLElement)) this.draw(target as HTMLElement);
      }
    },
    { root: null, rootMargin: "300px" },
  );
  private readonly resized = new ResizeObserver(() => this.resize());

  constructor(
    private readonly main: HTMLElement,
    params: URLSearchParams,
    private readonly context: Context,
    private readonly runs: string[],
  ) {
    const x = params.get("x") ?? "";
    this.hasArms = runs.length > 1 && context.sources.some((source) => source.arm && runs.includes(source.name));
    this.state = {
      x: x in X ? (x as Axis) : "steps",
      smooth: Number(params.get("smooth") || 0),
      log: params.has("log"),
      arms: this.hasArms && params.has("arms"),
      find: params.get("find") || "",
      zoom: (params.get("zoom") || "").split(",").map(Number),
    };
    this.controls = this.toolbar();
    const title = h("h1", { class: "unseen" }, "Overview");
    const parts = [title, this.tiles(), this.controls, this.left, this.charts, this.beside];
    replace(main, h("div", { class: "overview" }, parts));
    this.buttons();
    this.width = this.charts.clientWidth;
    this.resized.observe(this.charts);
  }

  page(): Page {
    return {
      keys: {
        l: () => this.set({ log: !this.state.log }),
        a: () => this.hasArms && this.set({ arms: !this.state.arms }),
        "/": () => this.controls.querySelector("input")!.focus(),
      },
      refresh: () => this.refresh(),
      close: () => {
        this.closed = true;
        this.seen.disconnect();
        this.resized.disconnect();
        this.plots.forEach((plot) => plot.destroy());
      },
    };
  }

  // Read the runs. It ends when the first of them are drawn: all, or where they take their time, those that have come.
  load(): Promise<void> {
    const waiting = [...this.runs];
    const found = new Map<string, Curves>();
    return new Promise((drawn) => {
      let left = this.runs.length;
      let last = performance.now();
      const open = () => {
        this.take(found, left);
        last = performance.now();
        drawn();
      };
      const read = async () => {
        for (let run = waiting.shift(); run && !this.closed; run = waiting.shift()) {
          const curves = await ask("curves", { run }).catch(() => null);
          if (curves) found.set(run, curves);
          left -= 1;
          if (performance.now() - last > PATIENCE_MS) open();
        }
      };
      Promise.all(Array.from({ length: AT_ONCE }, read)).then(open);
    });
  }

  private async refresh(): Promise<void> {
    const found = await Promise.allSettled(this.runs.map((run) => ask("curves", { run })));
    const known = found.flatMap((each) => (each.status === "fulfilled" ? [each.value] : []));
    this.take(new Map(known.map((curves) => [curves.name, curves])), 0);
  }

  private take(found: Map<string, Curves>, left: number): void {
    if (this.closed) return;
    const before = this.names().join();
    this.curves = this.runs.flatMap((run) => found.get(run) ?? []);
    this.left.textContent = left ? `${plural(left, "run")} still to read` : "";
    this.main.querySelector(".tiles")!.replaceWith(this.tiles());
    if (this.names().join() !== before || !before) this.layout();
    else this.redraw();
    if (!left) this.drawBeside();
  }

  // ---------------------------------------------------------------- controls

  private toolbar(): HTMLElement {
    const { state } = this;
    const axes = Object.keys(X).map((name) => {
      return h("button", { "data-x": name, onclick: () => this.set({ x: name as Axis, zoom: [] }) }, name);
    });
    const flag = (name: "log" | "arms", title: string, key: string) => {
      return h(
        "button",
        { "data-flag": name, onclick: () => this.set({ [name]: !state[name] }) },
        title,
        h("kbd", {}, key),
      );
    };
    return h(
      "div",
      { class: "controls", role: "toolbar", "aria-label": "How curves are drawn" },
      h("input", {
        type: "search",
        placeholder: "find a metric",
        value: state.find,
        "aria-label": "Find a metric",
        oninput: (event) => this.set({ find: entered(event) }),
      }),
      h("span", { class: "segmented", role: "group", "aria-label": "What x is" }, axes),
      h(
        "label",
        {},
        "smooth ",
        h("input", {
          type: "range",
          min: "0",
          max: "0.98",
          step: "0.02",
          value: String(state.smooth),
          "aria-label": "Smoothing",
          oninput: (event) => this.set({ smooth: Number(entered(event)) }),
        }),
      ),
      flag("log", "log axis", "l"),
      this.hasArms ? flag("arms", "arms", "a") : null,
      h("button", { class: "reset", hidden: true, onclick: () => this.set({ zoom: [] }) }, "all of it"),
    );
  }

  private set(changes: Partial<State>): void {
    Object.assign(this.state, changes);
    this.keepZoom(changes);
    this.buttons();
    if ("smooth" in changes) this.redraw();
    else this.layout();
  }

  // Write the state into the address.
  private keepZoom(changes: Partial<State>): void {
    const zoom = this.state.zoom.map((x) => +x.toPrecision(6));
    change({ ...(changes as Params), zoom: zoom.length === 2 ? zoom.join(",") : null });
  }

  private buttons(): void {
    const pressed = (button: Element, on: boolean) => button.setAttribute("aria-pressed", String(on));
    for (const button of this.controls.querySelectorAll<HTMLElement>("[data-x]")) {
      pressed(button, button.dataset.x === this.state.x);
    }
    for (const button of this.controls.querySelectorAll<HTMLElement>("[data-flag]")) {
      pressed(button, this.state[button.dataset.flag as "log" | "arms"]);
    }
    this.controls.querySelector<HTMLElement>(".reset")!.hidden = this.state.zoom.length !== 2;
  }

  // ---------------------------------------------------------------- charts

  private names(): string[] {
    const wanted = this.state.find.toLowerCase().split(/\s+/).filter(Boolean);
    return metricNames(this.curves).filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
  }

  private series(name: string) {
    return seriesOf(name, this.curves, this.state, this.context);
  }

  // The only value that a metric has in all runs, if it has only one.
  private constant(name: string): number | undefined {
    const series = this.series(name);
    const values = new Set(series.flatMap(({ y }) => y.filter(isKnown)));
    return values.size === 1 && series.some(({ y }) => y.length > 1) ? [...values][0] : undefined;
  }

  private layout(): void {
    this.plots.forEach((plot) => plot.destroy());
    this.plots.clear();
    const left = new Set(this.names());
    const sections = SECTIONS.map(([title, fits]) => {
      const mine = [...left].filter((name) => fits.test(name)).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
      mine.forEach((name) => left.delete(name));
      return this.section(
        title,
        mine.filter((name) => this.series(name).length),
      );
    });
    const nothing = this.state.find
      ? `No metric is called like “${this.state.find}”.`
      : "No step has finished yet; curves appear here as they do.";
    replace(this.charts, sections.some(Boolean) ? sections : h("p", { class: "empty" }, nothing));
    this.seen.disconnect();
    this.charts.querySelectorAll(".chart").forEach((figure) => this.seen.observe(figure));
  }

  private section(title: string, names: string[]): Child {
    if (!names.length) return null;
    const still = this.state.find ? [] : names.filter((name) => this.constant(name) !== undefined);
    const varying = names.filter((name) => !still.includes(name));
    const figures = varying.map((name) => {
      return h("figure", { class: "chart", "data-name": name }, h("figcaption", {}, titleOf(name)));
    });
    const same = still.map((name) => `${name} ${number(this.constant(name))}`).join(", ");
    return h(
      "section",
      {},
      h("h2", {}, title, h("span", { class: "count" }, String(varying.length))),
      h("div", { class: "grid" }, figures),
      same ? h("p", { class: "still" }, "The same in every step: ", same) : null,
    );
  }

  private draw(figure: HTMLElement): void {
    const { state } = this;
    const title = titleOf(figure.dataset.name!);
    const series = this.series(figure.dataset.name!);
    if (!series.length) return;
    this.plots.get(figure)?.destroy();
    figure.querySelector(".readings")?.remove();
    const over = [...new Set(series.map((each) => each.over).filter(Boolean))].join("; ");
    replace(figure.querySelector("figcaption")!, title, over ? h("span", { class: "over", title: over }, over) : null);
    const plot = chart(figure, {
      title,
      series,
      marks: marksOf(this.curves, state.x),
      log: state.log,
      height: CHART_PX,
      group: this.group,
      xLabel: X[state.x],
    });
    this.plots.set(figure, plot);
    if (state.zoom.length === 2) plot.setScale("x", { min: state.zoom[0], max: state.zoom[1] });
    plot.hooks.setScale = [(u, key) => key === "x" && this.zoomed(u)];
  }

  private redraw(): void {
    for (const figure of this.plots.keys()) this.draw(figure);
  }

  // All charts follow the one that was zoomed.
  private zoomed(plot: uPlot): void {
    if (this.zooming) return;
    const { min, max } = plot.scales.x as { min: number; max: number };
    const all = plot.data[0];
    const whole = min <= all[0] && max >= all.at(-1)!;
    this.zooming = true;
    this.state.zoom = whole ? [] : [min, max];
    this.keepZoom({});
    for (const other of this.plots.values()) {
      const x = other.data[0];
      if (other !== plot) other.setScale("x", whole ? { min: x[0], max: x.at(-1)! } : { min, max });
    }
    this.zooming = false;
    this.buttons();
  }

  private resize(): void {
    if (Math.abs(this.charts.clientWidth - this.width) < 8) return;
    this.width = this.charts.clientWidth;
    for (const [figure, plot] of this.plots) plot.setSize({ width: widthOf(figure), height: CHART_PX });
  }

  // ---------------------------------------------------------------- beside the charts

  private tiles(): HTMLElement {
    const shown = this.runs.length > MOST_TILES ? [] : this.curves;
    return h(
      "div",
      { class: "tiles" },
      shown.map((run) => tile(run, this.context)),
    );
  }

  private async drawBeside(): Promise<void> {
    const compared = await ask("studies", { runs: this.context.asked() });
    replace(this.beside, studies(compared), warnings(this.curves), settings(this.curves, this.context));
  }
}

function tile(run: Curves, context: Context): HTMLElement {
  const source = context.sources.find((each) => each.name === run.name)!;
  const last = (name: string) => number((run.metrics[name] || []).findLast(isKnown));
  const evaluation = run.evaluations.at(-1);
  const solved = evaluation?.pass_at_1 as Interval | undefined;
  const fact = (name: string, value: string) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value));
  return h(
    "article",
    { class: "tile" },
    h("h2", {}, swatch(context.colours.get(run.name)!), run.name),
    h(
      "p",
      { class: "muted" },
      `${source.model} on ${source.tasks} · ${source.state}, ${source.done} of ${source.steps} steps`,
    ),
    h(
      "dl",
      { class: "facts-row" },
      fact("reward", last("reward")),
      fact("env CE", last("env_output_ce")),
      evaluation && solved ? fact(`pass@1 at ${evaluation.step}`, number(solved.value)) : null,
      run.warnings.length ? fact("warnings", number(run.warnings.length)) : null,
    ),
  );
}

function warnings(curves: Curves[]): Child {
  const rows = curves.flatMap((run) => {
    return run.warnings.map(({ step, text }) => {
      const where = curves.length > 1 ? `${run.name}, step ${step}` : `step ${step}`;
      return h("li", {}, h("span", { class: "where" }, where), visible(text));
    });
  });
  if (!rows.length) return null;
  return h("section", { class: "card" }, h("h2", {}, "What the guard warned of"), h("ul", { class: "warnings" }, rows));
}

function settings(curves: Curves[], context: Context): Child {
  if (!curves.length) return null;
  const keys = [...new Set(curves.flatMap((run) => Object.keys(run.settings)))];
  const text = (value: unknown) => (value === undefined ? "–" : JSON.stringify(value));
  const differ = keys.filter((key) => new Set(curves.map((run) => text(run.settings[key]))).size > 1);
  const heads = (): Child[] => ["setting", ...curves.map((run) => [swatch(context.colours.get(run.name)!), run.name])];
  const rows = (names: string[]) => names.map((key) => [key, ...curves.map((run) => visible(text(run.settings[key])))]);
  const compared = differ.length
    ? table("Settings that differ", heads(), rows(differ), "settings")
    : h("p", { class: "note" }, "None: all these runs have the same settings.");
  const several = curves.length > 1;
  return h(
    "section",
    { class: "card" },
    several ? [h("h2", {}, "Settings that differ"), compared] : null,
    h(
      "details",
      {},
      h("summary", {}, several ? "all settings" : "Settings"),
      table("All settings", heads(), rows(keys), "settings"),
    ),
  );
}

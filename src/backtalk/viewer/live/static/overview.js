// Curves of every metric, runs or arms together; what differs between their settings; what the guard warned of.

import { ask } from "./api.js";
import { chart, smooth } from "./charts.js";
import { h, number, replace, visible } from "./dom.js";
import { change, read } from "./state.js";
import { studies } from "./studies.js";

const X = { steps: "step", tokens: "tokens", seconds: "seconds" };
const SECTIONS = [
  ["Held out", (name) => name.startsWith("held-out ")],
  ["Reward", (name) => /^(reward|solved|groups_with_signal|length_penalty|no_reward|failed|rollouts)$/.test(name)],
  ["World model", (name) => /_ce(\/|_|$)|^world_model|target_|copied_share|effective_obs|world_pull/.test(name)],
  ["Behaviour", (name) => /turns|invalid|confusion|timeouts|truncated|stop_reason|entropy|retries|unclean|alarms/.test(name)],
  ["Optimisation", (name) => /loss|grad|learning_rate|ratio|clip|kl|update|skipped|gap|stale/.test(name)],
  ["Tokens and time", (name) => /tokens|share|seconds|sequences/.test(name)],
  ["Other", () => true],
];
const FIRST = ["held-out pass_at_1", "held-out env_ce_recorded", "reward", "solved", "env_output_ce", "env_output_ce_new", "world_model_coeff", "num_turns", "invalid_calls", "entropy", "grad_norm", "world_grad_share"];
const rank = (name) => (FIRST.indexOf(name) + 1 || FIRST.length + 1);
const TITLES = { "held-out pass_at_1": "pass@1", "held-out pass_at_k": "pass@k", "held-out reward": "reward", "held-out env_ce_recorded": "cross-entropy, recorded rollouts", "held-out env_ce_own": "cross-entropy, own rollouts" };
const CHART_PX = 168;

export async function overview(main, params, context) {
  const state = {
    x: params.get("x") in X ? params.get("x") : "steps", smooth: Number(params.get("smooth") || 0), log: params.has("log"), arms: params.has("arms"),
    find: params.get("find") || "", zoom: (params.get("zoom") || "").split(",").map(Number),
  };
  const runs = context.selected(params).filter((name) => context.sources.find((source) => source.name === name)?.kind === "run");
  let curves = await fetchAll(runs);
  const plots = new Map();
  const group = `sync-${Math.random()}`;
  let zooming = false;

  const hasArms = context.sources.some((source) => source.arm && runs.includes(source.name)) && runs.length > 1;
  const charts = h("div", { class: "charts" });
  const beside = h("div", { class: "beside" });
  const controls = h("div", { class: "controls", role: "toolbar", "aria-label": "How curves are drawn" },
    h("input", { type: "search", placeholder: "find a metric", value: state.find, "aria-label": "Find a metric", oninput: (event) => set({ find: event.target.value }) }),
    h("span", { class: "segmented", role: "group", "aria-label": "What x is" }, Object.keys(X).map((name) => h("button", { "data-x": name, onclick: () => set({ x: name, zoom: null }) }, name))),
    h("label", {}, "smooth ", h("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: String(state.smooth), "aria-label": "Smoothing", oninput: (event) => set({ smooth: Number(event.target.value) }) })),
    h("button", { "data-flag": "log", onclick: () => set({ log: !state.log }) }, "log axis", h("kbd", {}, "l")),
    hasArms ? h("button", { "data-flag": "arms", onclick: () => set({ arms: !state.arms }) }, "arms", h("kbd", {}, "a")) : null,
    h("button", { class: "reset", hidden: true, onclick: () => set({ zoom: null }) }, "all of it"));
  replace(main, h("div", { class: "overview" }, h("h1", { class: "unseen" }, "Overview"), tiles(), controls, charts, beside));

  function tiles() {
    return h("div", { class: "tiles" }, curves.map((run) => {
      const source = context.sources.find((each) => each.name === run.name);
      const last = (name) => (run.metrics[name] || []).findLast((value) => value !== null);
      const evaluation = run.evaluations.at(-1);
      const fact = (name, value) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value));
      return runs.length > 6 ? null : h("article", { class: "tile" },
        h("h2", {}, h("span", { class: "swatch", style: { background: context.colours.get(run.name) } }), run.name),
        h("p", { class: "muted" }, `${source.model} on ${source.tasks} · ${source.state === "running" ? "running" : source.state}, ${source.done} of ${source.steps} steps`),
        h("dl", { class: "facts-row" }, fact("reward", number(last("reward"))), fact("env CE", number(last("env_output_ce"))), evaluation?.pass_at_1 ? fact(`pass@1 at ${evaluation.step}`, number(evaluation.pass_at_1.value)) : null, run.warnings.length ? fact("warnings", number(run.warnings.length)) : null));
    }));
  }

  // ---------------------------------------------------------------- series

  function seriesOf(name) {
    const held = name.startsWith("held-out ") ? name.slice(9) : null;
    const one = (run) => {
      const colour = context.colours.get(run.name);
      const dash = context.dashes.get(run.name);
      if (held) {
        const points = run.evaluations.filter((evaluation) => evaluation[held]);
        const at = (step) => (state.x === "steps" || !step ? (state.x === "steps" ? step : 0) : run[state.x][run.steps.indexOf(step - 1)] ?? step);
        return { name: run.name, over: "95 % over tasks", colour, dash, x: points.map((p) => at(p.step)), y: points.map((p) => p[held].value), low: points.map((p) => p[held].low), high: points.map((p) => p[held].high), points: true };
      }
      const x = state.x === "steps" ? run.steps : run[state.x];
      return { name: run.name, colour, dash, x, y: smooth(run.metrics[name] || x.map(() => null), state.smooth) };
    };
    const found = curves.map(one).filter((each) => each.y.some((y) => y !== null && y !== undefined));
    return state.arms && hasArms ? byArm(found, held) : found;
  }

  // What a finished study estimated, else the mean over seeds with the range over them, by the x of the longest.
  function byArm(series, held) {
    const arms = new Map();
    for (const each of series) {
      const arm = context.sources.find((source) => source.name === each.name)?.arm || each.name;
      arms.set(arm, [...(arms.get(arm) || []), each]);
    }
    return [...arms].map(([arm, seeds]) => {
      const study = held && state.x === "steps" && curves.find((run) => run.name === seeds[0].name).arm_curves;
      const known = study?.curves?.[held];
      if (known) return { name: arm, over: `95 % over ${study.over}`, colour: seeds[0].colour, x: known.map((p) => p.step), y: known.map((p) => p.value), low: known.map((p) => p.low), high: known.map((p) => p.high), points: true };
      const longest = seeds.reduce((a, b) => (a.x.length >= b.x.length ? a : b));
      const at = longest.x.map((_, index) => seeds.map((seed) => seed.y[index]).filter((y) => y !== null && y !== undefined));
      const over = (f) => at.map((values) => (values.length ? f(values) : null));
      const bounds = seeds.length > 1 ? { low: over((v) => Math.min(...v)), high: over((v) => Math.max(...v)) } : { low: longest.low, high: longest.high };
      return { name: arm, over: seeds.length > 1 ? `mean and range of ${seeds.length} seeds` : held ? "95 % over tasks" : "", colour: seeds[0].colour, x: longest.x, y: over((v) => v.reduce((a, b) => a + b, 0) / v.length), ...bounds, points: longest.points };
    });
  }

  function marksOf() {
    return curves.flatMap((run) => run.warnings.map((warning) => ({ x: state.x === "steps" ? warning.step : run[state.x][run.steps.indexOf(warning.step)], text: warning.text })));
  }

  // ---------------------------------------------------------------- drawing

  function names() {
    const all = new Set(curves.flatMap((run) => [...run.evaluations.flatMap((e) => Object.keys(e).filter((key) => e[key]?.value !== undefined).map((key) => `held-out ${key}`)), ...Object.keys(run.metrics)]));
    const wanted = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    return [...all].filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
  }

  // The only value that a metric has in all runs, if it has only one.
  function constant(name) {
    const values = new Set(seriesOf(name).flatMap((each) => each.y.filter((y) => y !== null && y !== undefined)));
    return values.size === 1 && seriesOf(name).some((each) => each.y.length > 1) ? { value: [...values][0] } : null;
  }

  function layout() {
    for (const plot of plots.values()) plot.destroy();
    plots.clear();
    const left = new Set(names());
    const sections = SECTIONS.map(([title, fits]) => {
      const mine = [...left].filter(fits).sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
      mine.forEach((name) => left.delete(name));
      const known = mine.filter((name) => seriesOf(name).length);
      const varying = known.filter((name) => state.find || !constant(name));
      const still = known.filter((name) => !varying.includes(name));
      return known.length ? h("section", {}, h("h2", {}, title, h("span", { class: "count" }, String(varying.length))),
        h("div", { class: "grid" }, varying.map((name) => h("figure", { class: "chart", "data-name": name }, h("figcaption", {}, TITLES[name] || name)))),
        still.length ? h("p", { class: "still" }, "The same in every step: ", still.map((name) => `${name} ${number(constant(name).value)}`).join(", ")) : null) : null;
    });
    replace(charts, sections.some(Boolean) ? sections : h("p", { class: "empty" }, state.find ? `No metric is called like “${state.find}”.` : "No step has finished yet; curves appear here as they do."));
    seen.disconnect();
    charts.querySelectorAll(".chart").forEach((figure) => seen.observe(figure));
  }

  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting && !plots.has(target)) draw(target);
  }, { root: null, rootMargin: "300px" });

  function draw(figure) {
    const name = figure.dataset.name;
    const series = seriesOf(name);
    if (!series.length) return;
    plots.get(figure)?.destroy();
    figure.querySelector(".readings")?.remove();
    const over = [...new Set(series.map((each) => each.over).filter(Boolean))].join("; ");
    replace(figure.querySelector("figcaption"), TITLES[name] || name, over && h("span", { class: "over", title: over }, over));
    const plot = chart(figure, { title: TITLES[name] || name, series, marks: marksOf(), log: state.log, height: CHART_PX, group, xLabel: X[state.x] });
    plots.set(figure, plot);
    if (state.zoom.length === 2) plot.setScale("x", { min: state.zoom[0], max: state.zoom[1] });
    plot.hooks.setScale = [(u, key) => key === "x" && zoomed(u)];
  }

  function zoomed(u) {
    if (zooming) return;
    const { min, max } = u.scales.x;
    const data = u.data[0];
    const whole = min <= data[0] && max >= data.at(-1);
    zooming = true;
    state.zoom = whole ? [] : [min, max];
    change({ zoom: whole ? null : `${+min.toPrecision(6)},${+max.toPrecision(6)}` });
    for (const other of plots.values()) if (other !== u) other.setScale("x", whole ? { min: other.data[0][0], max: other.data[0].at(-1) } : { min, max });
    zooming = false;
    buttons();
  }

  function buttons() {
    controls.querySelectorAll("[data-x]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.x === state.x)));
    controls.querySelectorAll("[data-flag]").forEach((button) => button.setAttribute("aria-pressed", String(state[button.dataset.flag])));
    controls.querySelector(".reset").hidden = state.zoom.length !== 2;
  }

  function set(changes) {
    Object.assign(state, changes);
    if ("zoom" in changes) state.zoom = [];
    change({ ...changes, zoom: state.zoom.length === 2 ? state.zoom.join(",") : null });
    buttons();
    if ("smooth" in changes) for (const figure of plots.keys()) draw(figure);
    else layout();
  }

  const compared = await ask("studies", { runs: runs.length === context.sources.length ? "" : runs.join("\n") });
  function drawBeside() { replace(beside, studies(compared), warnings(curves), settings(curves, context)); }

  buttons();
  layout();
  drawBeside();
  let width = charts.clientWidth;
  const resized = new ResizeObserver(() => {
    if (Math.abs(charts.clientWidth - width) < 8) return;
    width = charts.clientWidth;
    for (const [figure, plot] of plots) plot.setSize({ width: Math.max(120, figure.clientWidth - 4), height: CHART_PX });
  });
  resized.observe(charts);
  return {
    keys: { l: () => set({ log: !state.log }), a: () => hasArms && set({ arms: !state.arms }), "/": () => controls.querySelector("input").focus() },
    async refresh() {
      const before = names().join();
      curves = await fetchAll(runs);
      main.querySelector(".tiles").replaceWith(tiles());
      if (names().join() !== before) layout();
      else for (const figure of plots.keys()) draw(figure);
      drawBeside();
    },
    close: () => { seen.disconnect(); resized.disconnect(); for (const plot of plots.values()) plot.destroy(); },
  };
}

async function fetchAll(runs) {
  const found = await Promise.allSettled(runs.map((run) => ask("curves", { run })));
  return found.filter((each) => each.status === "fulfilled").map((each) => each.value);
}

function warnings(curves) {
  const rows = curves.flatMap((run) => run.warnings.map((warning) => h("li", {}, h("span", { class: "where" }, curves.length > 1 ? `${run.name}, step ${warning.step}` : `step ${warning.step}`), visible(warning.text))));
  return rows.length ? h("section", { class: "card" }, h("h2", {}, "What the guard warned of"), h("ul", { class: "warnings" }, rows)) : null;
}

function settings(curves, context) {
  if (!curves.length) return null;
  const keys = [...new Set(curves.flatMap((run) => Object.keys(run.settings)))];
  const text = (value) => (value === undefined ? "–" : JSON.stringify(value));
  const differ = keys.filter((key) => new Set(curves.map((run) => text(run.settings[key]))).size > 1);
  const table = (rows) => h("div", { class: "scroll-x" }, h("table", { class: "settings" },
    h("thead", {}, h("tr", {}, h("th", {}, "setting"), curves.map((run) => h("th", {}, h("span", { class: "swatch", style: { background: context.colours.get(run.name) } }), run.name)))),
    h("tbody", {}, rows.map((key) => h("tr", {}, h("th", { scope: "row" }, key), curves.map((run) => h("td", {}, visible(text(run.settings[key])))))))));
  return h("section", { class: "card" }, curves.length > 1 ? [h("h2", {}, "Settings that differ"), differ.length ? table(differ) : h("p", { class: "note" }, "None: all these runs have the same settings.")] : null,
    h("details", {}, h("summary", {}, curves.length > 1 ? "all settings" : "Settings"), table(keys)));
}

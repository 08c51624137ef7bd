// What finished studies found: arms against the first, with intervals; single tasks, equal cost, speed-ups where measured.

import { h, number } from "./dom.js";

const isShare = (metric) => metric.startsWith("pass@");
const shown = (metric, value, digits = 3) => (isShare(metric) ? `${number(100 * value, digits)} %` : number(value, digits));

function interval(metric, each, { difference = false, plain = false } = {}) {
  if (!each) return "–";
  const text = (value) => (plain ? number(value) : shown(metric, value));
  const sign = difference && each.value > 0 ? "+" : "";
  return `${sign}${text(each.value)}${each.low === null || each.low === undefined ? "" : ` [${text(each.low)}, ${text(each.high)}]`}`;
}

function table(title, heads, rows) {
  return h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": title }, h("table", { class: "kinds" },
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, first), cells.map((cell) => h("td", {}, cell)))))));
}

function results(study, fits) {
  const rows = study.results.filter(fits);
  if (!rows.length) return null;
  const first = study.results[0].arm;
  const hasCurve = rows.some((row) => row.over_run);
  const hasP = rows.some((row) => row.p_holm !== null && row.p_holm !== undefined);
  const heads = ["", "arm", "before", "after", "change", `after, minus ${first}`, ...(hasCurve ? ["mean over the run", `mean, minus ${first}`] : []), ...(hasP ? ["p", "p, Holm"] : [])];
  return table(`Held-out tasks of study ${study.study}`, heads, rows.map((row) => {
    const at = (name, options) => interval(row.metric, row[name], options);
    const curve = hasCurve ? [at("over_run"), at("over_run_against_first", { difference: true })] : [];
    return [row.metric, row.arm, at("before"), at("after"), at("change", { difference: true }), at("against_first", { difference: true }), ...curve, ...(hasP ? [number(row.p), number(row.p_holm)] : [])];
  }));
}

function scores(study, fits) {
  const rows = (study.scores || []).filter(fits);
  return rows.length ? [h("h3", {}, "Single tasks and runs"), table("Single tasks and runs", ["", "arm", "interquartile mean", `probability of improvement over ${study.results[0].arm}`],
    rows.map((row) => [row.metric, row.arm, interval(row.metric, row.iqm), interval(row.metric, row.improvement, { plain: true })]))] : null;
}

function equal(study, fits) {
  const rows = (study.equal || []).filter(fits);
  return rows.length ? [h("h3", {}, "At equal cost of training"), table("At equal cost of training", ["", "arm", "when each had spent", "value", `minus ${study.results[0].arm}`],
    rows.map((row) => [row.metric, row.arm, `${number(Math.round(row.amount))} ${row.unit}`, interval(row.metric, row.value), interval(row.metric, row.against_first, { difference: true })]))] : null;
}

function reached(study, fits) {
  const rows = (study.reached || []).filter(fits);
  const amount = (value, end) => (value === null ? `> ${number(Math.round(end))}` : number(Math.round(value)));
  return rows.length ? [h("h3", {}, "To reach the control's best"), h("p", { class: "note" }, study.reach_rule), table("To reach the control's best", ["", "arm", "unit", `reached after, seeds ${study.seeds.join(", ")}; > where it had not by the end`, "speed-up"],
    rows.map((row) => [row.metric, row.arm, row.unit, row.amounts.map((value, seed) => amount(value, row.ended[seed])).join(", "), interval(row.metric, row.speedup, { plain: true })]))] : null;
}

// `fits` chooses rows by their metric.
export function studies(found, fits = () => true) {
  return found.map((study) => h("section", { class: "card" }, h("h2", {}, `Study ${study.study}`), results(study, fits), scores(study, fits), equal(study, fits), reached(study, fits),
    h("p", { class: "note" }, `Means over seeds ${study.seeds.join(", ")}; brackets are 95 % intervals by a bootstrap over ${study.interval}. Differences are in pairs of seed and task. Cross-entropies in nats a token of environment output.`)));
}

// What finished studies found: arms against the first, with intervals; single tasks, equal cost, speed-ups where measured.

import type { Interval, Maybe, Result, Study } from "./answers";
import { isKnown } from "./charts";
import { type Child, h, number, percent, table } from "./dom";

export type Fits = (row: { metric: string }) => boolean;

interface Options {
  difference?: boolean; // with its sign
  plain?: boolean; // a number, also of a metric that is a share
}

const SHARE = /^(pass@|true answer|token accuracy|lines|exact)/;

function interval(metric: string, found: Interval | null | undefined, { difference, plain }: Options = {}): string {
  if (!found) return "–";
  const text = (value: Maybe) => (isKnown(value) && SHARE.test(metric) && !plain ? percent(value) : number(value));
  const sign = difference && found.value > 0 ? "+" : "";
  const bounds = isKnown(found.low) ? ` [${text(found.low)}, ${text(found.high)}]` : "";
  return `${sign}${text(found.value)}${bounds}`;
}

const DIFFERENCE = { difference: true };
const PLAIN = { plain: true };

function results(study: Study, fits: Fits): Child {
  const rows = study.results.filter(fits);
  if (!rows.length) return null;
  const first = study.results[0].arm;
  const hasCurve = rows.some((row) => row.over_run);
  const hasP = rows.some((row) => isKnown(row.p_holm));
  const heads = ["", "arm", "before", "after", "change", `after, minus ${first}`];
  if (hasCurve) heads.push("mean over the run", `mean, minus ${first}`);
  if (hasP) heads.push("p", "p, Holm");
  const cells = (row: Result) => {
    const { metric } = row;
    const found = [metric, row.arm, interval(metric, row.before), interval(metric, row.after)];
    found.push(interval(metric, row.change, DIFFERENCE), interval(metric, row.against_first, DIFFERENCE));
    if (hasCurve) found.push(interval(metric, row.over_run), interval(metric, row.over_run_against_first, DIFFERENCE));
    if (hasP) found.push(number(row.p), number(row.p_holm));
    return found;
  };
  return table(`Held-out tasks of study ${study.study}`, heads, rows.map(cells));
}

function titled(title: string, heads: string[], rows: Child[][], note?: string): Child {
  if (!rows.length) return null;
  return [h("h3", {}, title), note ? h("p", { class: "note" }, note) : null, table(title, heads, rows)];
}

function scores(study: Study, fits: Fits): Child {
  const heads = ["", "arm", "interquartile mean", `probability of improvement over ${study.results[0].arm}`];
  const rows = (study.scores || []).filter(fits).map((row) => {
    return [row.metric, row.arm, interval(row.metric, row.iqm), interval(row.metric, row.improvement, PLAIN)];
  });
  return titled("Single tasks and runs", heads, rows);
}

function equal(study: Study, fits: Fits): Child {
  const heads = ["", "arm", "when each had spent", "value", `minus ${study.results[0].arm}`];
  const rows = (study.equal || []).filter(fits).map((row) => {
    const spent = `${number(Math.round(row.amount))} ${row.unit}`;
    const difference = interval(row.metric, row.against_first, DIFFERENCE);
    return [row.metric, row.arm, spent, interval(row.metric, row.value), difference];
  });
  return titled("At equal cost of training", heads, rows);
}

function reached(study: Study, fits: Fits): Child {
  const after = `reached after, seeds ${study.seeds.join(", ")}; > where it had not by the end`;
  const rows = (study.reached || []).filter(fits).map((row) => {
    const amounts = row.amounts.map((amount, seed) => {
      return amount === null ? `> ${number(Math.round(row.ended[seed]))}` : number(Math.round(amount));
    });
    return [row.metric, row.arm, row.unit, amounts.join(", "), interval(row.metric, row.speedup, PLAIN)];
  });
  return titled("To reach the control's best", ["", "arm", "unit", after, "speed-up"], rows, study.reach_rule);
}

// `fits` chooses rows by their metric.
export function studies(found: Study[], fits: Fits = () => true): HTMLElement[] {
  return found.map((study) => {
    const about =
      `Means over seeds ${study.seeds.join(", ")}; brackets are 95 % intervals by a bootstrap over ${study.interval}. ` +
      "Differences are in pairs of seed and task. Cross-entropies in nats a token of environment output.";
    const parts = [results, scores, equal, reached].map((part) => part(study, fits));
    return h(
      "section",
      { class: "card" },
      h("h2", {}, `Study ${study.study}`),
      parts,
      h("p", { class: "note" }, about),
    );
  });
}

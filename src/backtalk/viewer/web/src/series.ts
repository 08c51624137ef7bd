// Turn the curves of runs into what a chart draws: one line a run, or one with a band for each arm of a study.

import type { Curves, Evaluation, Interval } from "./answers";
import { isKnown, type Mark, type Series, smooth } from "./charts";
import type { Context } from "./state";

export const X = { steps: "step", tokens: "tokens", seconds: "seconds" };
export type Axis = keyof typeof X;
const HELD = "held-out ";

export interface Drawing {
  x: Axis;
  smooth: number;
  arms: boolean;
}

export const heldName = (name: string) => (name.startsWith(HELD) ? name.slice(HELD.length) : null);
const estimate = (evaluation: Evaluation, name: string) => evaluation[name] as Interval | undefined;

export function metricNames(curves: Curves[]): string[] {
  const all = new Set<string>();
  for (const { evaluations, metrics } of curves) {
    for (const evaluation of evaluations) {
      const held = Object.keys(evaluation).filter((key) => isKnown(estimate(evaluation, key)?.value));
      held.forEach((key) => all.add(`${HELD}${key}`));
    }
    Object.keys(metrics).forEach((name) => all.add(name));
  }
  return [...all];
}

export function seriesOf(name: string, curves: Curves[], drawing: Drawing, context: Context): Series[] {
  const held = heldName(name);
  const found = curves.map((run) => {
    const line = held ? heldOut(run, held, drawing.x) : training(run, name, drawing);
    return { ...line, name: run.name, colour: context.colours.get(run.name)!, dash: context.dashes.get(run.name) };
  });
  const known = found.filter(({ y }) => y.some(isKnown));
  return drawing.arms ? byArm(known, held, curves, drawing, context) : known;
}

type Line = Omit<Series, "name" | "colour">;

function training(run: Curves, name: string, drawing: Drawing): Line {
  const x = run[drawing.x];
  return { x, y: smooth(run.metrics[name] || x.map(() => null), drawing.smooth) };
}

function heldOut(run: Curves, name: string, x: Axis): Line {
  const points = run.evaluations.filter((evaluation) => evaluation[name]);
  const values = points.map((point) => estimate(point, name)!);
  return {
    x: points.map(({ step }) => spentBefore(run, step, x)),
    y: values.map(({ value }) => value),
    low: values.map(({ low }) => low),
    high: values.map(({ high }) => high),
    points: true,
    over: "95 % over tasks",
  };
}

// What a run had spent when it was evaluated before a step.
function spentBefore(run: Curves, step: number, x: Axis): number {
  if (x === "steps") return step;
  return step ? (run[x][run.steps.indexOf(step - 1)] ?? step) : 0;
}

// What a finished study estimated, else the mean over seeds with the range over them, by the x of the longest.
function byArm(series: Series[], held: string | null, curves: Curves[], drawing: Drawing, context: Context): Series[] {
  const arms = Map.groupBy(series, ({ name }) => context.sources.find((source) => source.name === name)?.arm || name);
  return [...arms].map(([arm, seeds]) => {
    const { colour } = seeds[0];
    const study = curves.find(({ name }) => name === seeds[0].name)!.arm_curves;
    const known = held && drawing.x === "steps" ? study.curves?.[held] : undefined;
    if (known) {
      const column = <Name extends "step" | "value" | "low" | "high">(name: Name) => known.map((point) => point[name]);
      const [y, low, high] = [column("value"), column("low"), column("high")];
      return { name: arm, colour, x: column("step"), y, low, high, points: true, over: `95 % over ${study.over}` };
    }
    return { ...overSeeds(seeds, held), name: arm, colour };
  });
}

function overSeeds(seeds: Series[], held: string | null): Line {
  const longest = seeds.reduce((a, b) => (a.x.length >= b.x.length ? a : b));
  const { x, points } = longest;
  if (seeds.length === 1) return { ...longest, dash: undefined, over: held ? "95 % over tasks" : "" };
  const at = x.map((_, index) => seeds.map(({ y }) => y[index]).filter(isKnown));
  const over = (of: (values: number[]) => number) => at.map((values) => (values.length ? of(values) : null));
  return {
    x,
    points,
    y: over((values) => values.reduce((a, b) => a + b, 0) / values.length),
    low: over((values) => Math.min(...values)),
    high: over((values) => Math.max(...values)),
    over: `mean and range of ${seeds.length} seeds`,
  };
}

export function marksOf(curves: Curves[], x: Axis): Mark[] {
  return curves.flatMap((run) => {
    return run.warnings.map(({ step, text }) => ({ x: x === "steps" ? step : run[x][run.steps.indexOf(step)], text }));
  });
}

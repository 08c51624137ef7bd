// How often the likeliest token came, by how likely the model thought it: on the diagonal it knows how much it knows.

import type { Checkpoint } from "./answers";
import { type Child, colour, h, number, percent, svg, swatch, table } from "./dom";

const SIZE = 220; // of the picture, with the margins
const MARGIN = 12;
const INSIDE = SIZE - 2 * MARGIN;

const across = (share: number) => (MARGIN + share * INSIDE).toFixed(1);
const up = (share: number) => (SIZE - MARGIN - share * INSIDE).toFixed(1);

export function calibration(checkpoints: Checkpoint[]): Child {
  const known = checkpoints.filter(({ bins }) => bins.length);
  if (!known.length) return null;
  const colours = known.map((_, index) => colour(`--line-${index % 8}`));
  const lines = known.flatMap(({ bins }, index) => line(bins, colours[index]));
  const frame = { x: MARGIN, y: MARGIN, width: INSIDE, height: INSIDE, fill: "none", stroke: colour("--line") };
  const diagonal = {
    x1: across(0),
    y1: up(0),
    x2: across(1),
    y2: up(1),
    stroke: colour("--faint"),
    "stroke-dasharray": "4 4",
  };
  const about = "Calibration; the table beside it has the numbers";
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${SIZE} ${SIZE}`, width: SIZE, height: SIZE, role: "img", "aria-label": about },
    svg("rect", frame),
    svg("line", diagonal),
    ...lines,
  );
  const heads = ["checkpoint", "the likeliest token came", "it was given", "error"];
  const rows = known.map((checkpoint, index) => row(checkpoint, colours[index]));
  const note =
    "Across: the probability of the likeliest token, in ten bins. Up: how often it was the one that came. Below the " +
    "diagonal a model is too sure. The error is the mean distance from the diagonal, weighted by tokens.";
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Does it know how much it knows?"),
    h(
      "div",
      { class: "calibration" },
      picture,
      h("div", {}, table("Calibration", heads, rows), h("p", { class: "note" }, note)),
    ),
  );
}

function line(bins: Checkpoint["bins"], colour: string): SVGElement[] {
  const points = bins.map(({ sure, right }) => `${across(sure)},${up(right)}`).join(" ");
  const dots = bins.map(({ sure, right }) => svg("circle", { cx: across(sure), cy: up(right), r: 3, fill: colour }));
  return [svg("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2 }), ...dots];
}

function row({ name, bins, calibration_error }: Checkpoint, colour: string): Child[] {
  const total = bins.reduce((sum, { tokens }) => sum + tokens, 0);
  const mean = (column: "sure" | "right") => bins.reduce((sum, bin) => sum + bin[column] * bin.tokens, 0) / total;
  const title = [swatch(colour), " ", name];
  return [title, percent(mean("right")), percent(mean("sure")), `${number(100 * (calibration_error ?? 0))} points`];
}

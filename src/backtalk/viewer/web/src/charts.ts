// Draw one metric of several runs: lines with bands, warnings as marks, a pointer and a zoom that all charts share.

import uPlot from "uplot";
import type { Maybe } from "./answers";
import { type Child, colour, h, number, replace, swatch } from "./dom";

export interface Series {
  name: string;
  colour: string;
  dash?: number[];
  x: number[];
  y: (Maybe | undefined)[];
  low?: (Maybe | undefined)[];
  high?: (Maybe | undefined)[];
  points?: boolean; // drawn as such
  over?: string; // what the band is
}

export interface Mark {
  x: number;
  text: string;
}

interface Drawn {
  title: string;
  series: Series[];
  marks: Mark[];
  log: boolean;
  height: number;
  group: string; // of the charts that share pointer and zoom
  xLabel: string;
}

const FEW = 8; // points that are drawn as such, because a line alone may not be seen
const EDGE: uPlot.Series = { label: "", stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };

const translucent = (colour: string) => `color-mix(in srgb, ${colour} 11%, transparent)`;
export const isKnown = (value: Maybe | undefined): value is number => value !== null && value !== undefined;

export function chart(place: HTMLElement, drawn: Drawn): uPlot {
  const { title, series, marks, log, height, group } = drawn;
  const grid = { stroke: colour("--grid"), width: 1 };
  const axis: uPlot.Axis = {
    stroke: colour("--muted"),
    grid,
    ticks: { ...grid, size: 4 },
    font: `11px ${getComputedStyle(document.documentElement).getPropertyValue("--ui")}`,
    size: 30,
  };
  const readings = h("div", { class: "readings" });
  const at = h("span", { class: "at" });
  place.querySelector("figcaption")!.append(at);
  const positive = series.some(({ y }) => y.some((value) => isKnown(value) && value > 0));
  const { lines, bands } = layers(series);
  const plot = new uPlot(
    {
      width: widthOf(place),
      height,
      legend: { show: false },
      padding: [10, 16, 0, 0],
      cursor: {
        sync: { key: group, setSeries: false, scales: ["x", null] },
        drag: { x: true, y: false, setScale: true },
        points: { size: 6 },
        y: false,
      },
      scales: { x: { time: false }, y: log && positive ? { distr: 3 } : { range: padded } },
      axes: [
        { ...axis, values: (_, splits) => splits.map(short), space: 56 },
        { ...axis, values: (_, splits) => splits.map((x) => (x === null ? "" : short(x))), size: 46 },
      ],
      series: lines,
      bands,
      hooks: {
        setCursor: [(u) => tell(u, readings, at, drawn)],
        draw: [(u) => drawMarks(u, marks)],
      },
    },
    joined(series),
    place,
  );
  tell(plot, readings, at, drawn);
  place.append(readings);
  place.setAttribute("aria-label", describe(title, series));
  return plot;
}

export const widthOf = (place: HTMLElement) => Math.max(120, place.clientWidth - 4);

// Each series is a line, and where it has a band, the two edges of that.
function layers(series: Series[]): { lines: uPlot.Series[]; bands: uPlot.Band[] } {
  const lines: uPlot.Series[] = [{}];
  const bands: uPlot.Band[] = [];
  for (const each of series) {
    const first = lines.length;
    const show = each.points || each.y.filter(isKnown).length < FEW;
    const points = { show, size: 6, fill: each.colour };
    lines.push({ label: each.name, stroke: each.colour, width: 1.6, points, spanGaps: true, dash: each.dash });
    if (each.low) {
      lines.push({ ...EDGE }, { ...EDGE });
      bands.push({ series: [first + 2, first + 1], fill: translucent(each.colour) });
    }
  }
  return { lines, bands };
}

// Several series with x of their own as one table over all x.
function joined(series: Series[]): uPlot.AlignedData {
  const all = [...new Set(series.flatMap(({ x }) => x))].sort((a, b) => a - b);
  const place = new Map(all.map((x, index) => [x, index]));
  const spread = (each: Series, values: (Maybe | undefined)[]) => {
    const column = new Array<Maybe | undefined>(all.length).fill(undefined);
    each.x.forEach((x, index) => (column[place.get(x)!] = values[index] ?? null));
    return column;
  };
  const columns = series.flatMap((each) => {
    const parts = each.low && each.high ? [each.y, each.low, each.high] : [each.y];
    return parts.map((values) => spread(each, values));
  });
  return [all, ...columns];
}

// Exponential smoothing that does not begin at zero: a mean of what has been seen, weighted towards the last.
export function smooth(values: Series["y"], factor: number): Series["y"] {
  if (!factor) return values;
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (!isKnown(value)) return null;
    sum = sum * factor + value * (1 - factor);
    weight = weight * factor + (1 - factor);
    return sum / weight;
  });
}

function padded(_: uPlot, low: Maybe, high: Maybe): [number, number] {
  if (!isKnown(low) || !isKnown(high)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function short(x: number): string {
  const size = Math.abs(x);
  if (size >= 1e9) return `${+(x / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(x / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(x / 1e3).toPrecision(3)}k`;
  if (size && size < 1e-3) return x.toExponential(0).replace("-", "−");
  return String(+x.toPrecision(4)).replace("-", "−");
}

// Tell below a chart each series' value at the pointer, or where it has none there, the last one that was known.
function tell(u: uPlot, readings: Element, at: Element, { series, marks, xLabel }: Drawn): void {
  const index = u.cursor.idx ?? null;
  const rows: Child[] = [];
  let column = 1;
  for (const each of series) {
    const values = u.data[column];
    let where = index ?? values.length - 1;
    while (where >= 0 && !isKnown(values[where])) where -= 1;
    if (where >= 0) {
      const [low, high] = each.low ? [u.data[column + 1][where], u.data[column + 2][where]] : [null, null];
      rows.push(
        h(
          "span",
          { class: "reading" },
          swatch(each.colour),
          series.length > 1 ? h("span", { class: "reading-name" }, each.name) : null,
          h("b", {}, number(values[where], 4)),
          isKnown(low) ? ` [${number(low)}, ${number(high)}]` : null,
        ),
      );
    }
    column += each.low ? 3 : 1;
  }
  const x = index === null ? null : u.data[0][index];
  at.textContent = x === null ? "" : `${xLabel} ${short(x)}`;
  const close = marks.filter((mark) => mark.x === x);
  const warned = close.map((mark) => h("span", { class: "reading warn" }, `⚠ ${mark.text.split(":")[0]}`));
  replace(readings, rows, warned);
}

function drawMarks(u: uPlot, marks: Mark[]): void {
  const { ctx, bbox } = u;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("--warn-line");
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  for (const mark of marks) {
    const x = Math.round(u.valToPos(mark.x, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x - 4 * ratio, bbox.top);
    ctx.lineTo(x + 4 * ratio, bbox.top);
    ctx.lineTo(x, bbox.top + 6 * ratio);
    ctx.fill();
  }
  ctx.restore();
}

function describe(title: string, series: Series[]): string {
  const parts = series.map(({ name, y }) => {
    const known = y.filter(isKnown);
    if (!known.length) return `${name}: nothing measured`;
    return `${name}: from ${number(known[0])} to ${number(known.at(-1))} over ${known.length} points`;
  });
  return `${title}. ${parts.join(". ")}`;
}

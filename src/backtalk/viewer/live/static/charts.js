// Draw one metric of several runs: lines with bands, warnings as marks, a pointer and a zoom that all charts share.

import { h, number } from "./dom.js";
import uPlot from "./vendor/uPlot.esm.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const FEW = 8; // points that are drawn as such, because a line alone may not be seen

// Exponential smoothing that does not begin at zero: a mean of what has been seen, weighted towards the last.
export function smooth(values, factor) {
  if (!factor) return values;
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    sum = sum * factor + value * (1 - factor);
    weight = weight * factor + (1 - factor);
    return sum / weight;
  });
}

// Several series with x of their own as one table over all x.
export function joined(series) {
  const all = [...new Set(series.flatMap((each) => each.x))].sort((a, b) => a - b);
  const place = new Map(all.map((x, index) => [x, index]));
  const spread = (each, values) => {
    const column = new Array(all.length).fill(undefined);
    each.x.forEach((x, index) => { column[place.get(x)] = values[index] ?? null; });
    return column;
  };
  return [all, ...series.flatMap((each) => (each.low ? [spread(each, each.y), spread(each, each.low), spread(each, each.high)] : [spread(each, each.y)]))];
}

// series: {name, colour, x, y, low?, high?, points?}; marks: [{x, text, colour}]
export function chart(place, { title, series, marks, log, height, group, xLabel }) {
  const muted = css("--muted");
  const grid = { stroke: css("--grid"), width: 1 };
  const axis = { stroke: muted, grid, ticks: { ...grid, size: 4 }, font: `11px ${css("--ui")}`, size: 30 };
  const readings = h("div", { class: "readings" });
  const at = h("span", { class: "at" });
  place.querySelector("figcaption").append(at);
  const lines = [{}];
  const bands = [];
  for (const each of series) {
    const base = lines.length;
    lines.push({ label: each.name, stroke: each.colour, width: 1.6, points: { show: each.points || each.y.filter((y) => y !== null && y !== undefined).length < FEW, size: 6, fill: each.colour }, spanGaps: true, dash: each.dash });
    if (each.low) {
      const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
      lines.push({ ...edge, label: "" }, { ...edge, label: "" });
      bands.push({ series: [base + 2, base + 1], fill: translucent(each.colour) });
    }
  }
  const positive = series.some((each) => each.y.some((y) => y > 0));
  const plot = new uPlot({
    width: Math.max(120, place.clientWidth - 4), height,
    legend: { show: false },
    padding: [10, 16, 0, 0],
    cursor: { sync: { key: group, setSeries: false, scales: ["x", null] }, drag: { x: true, y: false, setScale: true }, points: { size: 6 }, y: false },
    scales: { x: { time: false }, y: log && positive ? { distr: 3 } : { range: padded } },
    axes: [{ ...axis, values: (u, splits) => splits.map(short), space: 56 }, { ...axis, size: 46, values: (u, splits) => splits.map((x) => (x === null ? "" : short(x))) }],
    series: lines, bands,
    hooks: {
      setCursor: [(u) => tell(u, readings, at, series, xLabel, marks)],
      draw: [(u) => drawMarks(u, marks)],
    },
  }, joined(series), place);
  tell(plot, readings, at, series, xLabel, marks);
  place.append(readings);
  place.setAttribute("aria-label", describe(title, series));
  return plot;
}

function padded(u, low, high) {
  if (low === null || high === null || low === undefined) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function short(x) {
  const size = Math.abs(x);
  if (size >= 1e9) return `${+(x / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(x / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(x / 1e3).toPrecision(3)}k`;
  if (size && size < 1e-3) return x.toExponential(0).replace("-", "−");
  return String(+x.toPrecision(4)).replace("-", "−");
}

const translucent = (colour) => `color-mix(in srgb, ${colour} 11%, transparent)`;

function tell(u, readings, at, series, xLabel, marks) {
  const index = u.cursor.idx;
  const rows = [];
  let column = 1;
  for (const each of series) {
    const values = u.data[column];
    let where = index ?? values.length - 1;
    while (where >= 0 && (values[where] === null || values[where] === undefined)) where -= 1; // what was known by then
    const value = where >= 0 ? values[where] : null;
    const spread = each.low && where >= 0 && u.data[column + 1][where] != null ? ` [${number(u.data[column + 1][where])}, ${number(u.data[column + 2][where])}]` : "";
    column += each.low ? 3 : 1;
    if (value === null || value === undefined) continue;
    rows.push(h("span", { class: "reading" }, h("span", { class: "swatch", style: { background: each.colour } }), series.length > 1 ? h("span", { class: "reading-name" }, each.name) : null, h("b", {}, number(value, 4)), spread));
  }
  const x = index === null || index === undefined ? null : u.data[0][index];
  at.textContent = x === null ? "" : `${xLabel} ${short(x)}`;
  const close = x === null ? [] : marks.filter((mark) => mark.x === x);
  readings.replaceChildren(...rows, ...close.map((mark) => h("span", { class: "reading warn" }, `⚠ ${mark.text.split(":")[0]}`)));
}

function drawMarks(u, marks) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = css("--warn-line");
  ctx.fillStyle = ctx.strokeStyle;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  for (const mark of marks) {
    const x = Math.round(u.valToPos(mark.x, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x - 4 * devicePixelRatio, bbox.top);
    ctx.lineTo(x + 4 * devicePixelRatio, bbox.top);
    ctx.lineTo(x, bbox.top + 6 * devicePixelRatio);
    ctx.fill();
  }
  ctx.restore();
}

function describe(title, series) {
  const parts = series.map((each) => {
    const known = each.y.filter((y) => y !== null && y !== undefined);
    return known.length ? `${each.name}: from ${number(known[0])} to ${number(known.at(-1))} over ${known.length} points` : `${each.name}: nothing measured`;
  });
  return `${title}. ${parts.join(". ")}`;
}

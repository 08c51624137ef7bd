// Answer from the page itself, where `backtalk view --export` or `report` wrote the answers into it.

const place = document.getElementById("frozen");
const held = place && JSON.parse(place.textContent);
export const isFrozen = Boolean(held);

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const index = held && (await unpack(held.index));
export const written = index?.written;
const opened = new Map(); // rollouts by key, unpacked
const keyOf = ({ run, part, row }) => `${run}\n${part}\n${row}`;

async function open(params) {
  const key = keyOf(params);
  if (!(key in held.rollouts)) throw new Error("This rollout is not in this file, which holds the last and first steps, as many as fit. `backtalk view` shows all of them.");
  if (!opened.has(key)) opened.set(key, await unpack(held.rollouts[key]));
  return opened.get(key);
}

export async function answer(name, params) {
  if (name === "sources") return index.sources;
  if (name === "curves") return known(index.curves[params.run], "This run's curves could not be read.");
  if (name === "studies") return index.world[""].studies;
  if (name === "world") return index.world[`${params.before}\n${params.after}`] || index.world[""];
  if (name === "rollouts") return select(params);
  const found = await open(params);
  return name === "rollout" ? found.rollout : name === "tokens" ? found.tokens : record(found);
}

function known(found, problem) {
  if (!found) throw new Error(problem);
  return found;
}

// The trajectory as files keep it, with its weights and scores.
function record({ rollout, tokens, messages }) {
  const roles = rollout.segments.flatMap((segment) => Array(segment.end - segment.start).fill(index.sources.roles.findIndex(({ role }) => role === segment.role)));
  const scores = Object.fromEntries(Object.entries(tokens.scores).map(([name, { logprobs }]) => [name, logprobs]));
  return {
    task_id: rollout.task, sample_index: rollout.sample, policy_version: rollout.version, reward: rollout.reward, stop_reason: rollout.stop, failure: rollout.failure,
    token_ids: tokens.ids, roles, logprobs: tokens.logprobs,
    segments: rollout.segments.map(({ role, start, end, sampled, turn, tool, branch }) => ({ role, length: end - start, sampled, turn, tool, branch })),
    messages, stats: rollout.stats, weights: tokens.policy && { advantage: rollout.advantage, policy: tokens.policy, world: tokens.world }, scores,
  };
}

// ---------------------------------------------------------------- the table, as query.py selects and sorts it

const TERM = /(?:([a-z_]+)(:|<=|>=|!=|=|<|>))?(?:"([^"]*)"?|(\S+))/g;
const isNumber = (text) => text.trim() !== "" && Number.isFinite(Number(text));

function isBound(op, value) {
  if (/[<>]/.test(op)) return isNumber(value);
  return value.split(",").every((part) => (part.includes("..") ? part.split("..").every((end) => end === "" || isNumber(end)) : isNumber(part)));
}

function parse(text) {
  const conditions = [];
  const words = [];
  for (const [whole, field, op, quoted, bare] of text.matchAll(TERM)) {
    const value = quoted ?? bare;
    if (field === undefined && value === "failed") conditions.push({ field: "stop", op: ":", value: "failed" });
    else if ((index.numbers.includes(field) && isBound(op, value)) || (index.texts.includes(field) && [":", "=", "!="].includes(op))) conditions.push({ field, op, value });
    else if (whole.replaceAll('"', "")) words.push(field !== undefined ? whole : value);
  }
  return { conditions, words };
}

function holds(row, { field, op, value }) {
  const fact = row[field];
  if (index.texts.includes(field)) {
    const text = typeof fact === "string" ? fact : fact ? JSON.stringify(fact) : "";
    const fits = value.split(",").some((part) => (op === ":" ? text.toLowerCase().includes(part.toLowerCase()) : text === part));
    return op === "!=" ? !fits : fits;
  }
  if (fact === null || fact === undefined) return false;
  if (/[<>]/.test(op)) return { "<": fact < +value, "<=": fact <= +value, ">": fact > +value, ">=": fact >= +value }[op];
  const fits = value.split(",").some((part) => {
    if (!part.includes("..")) return fact === Number(part);
    const [low, high] = part.split("..");
    return (low === "" || fact >= +low) && (high === "" || fact <= +high);
  });
  return op === "!=" ? !fits : fits;
}

function compare(a, b, descending) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1; // unknown comes last, whatever the order
  if (b === null || b === undefined) return -1;
  return (a < b ? -1 : 1) * (descending ? -1 : 1);
}

async function said(row, words) {
  if (!(keyOf(row) in held.rollouts)) return null;
  const { rollout } = await open(row);
  const text = rollout.segments.map((segment) => segment.text).join("");
  const low = text.toLowerCase();
  if (!words.every((word) => low.includes(word.toLowerCase()))) return null;
  const at = low.indexOf(words[0].toLowerCase());
  return text.slice(Math.max(0, at - 60), at + words[0].length + 60).replace(/\s+/g, " ").trim();
}

async function select({ q = "", sort = "step", order = "desc", offset = 0, limit = 100, runs = "" }) {
  const { conditions, words } = parse(q);
  const chosen = runs ? new Set(runs.split("\n")) : null;
  let rows = index.rows.filter((row) => (!chosen || chosen.has(row.run)) && conditions.every((condition) => holds(row, condition)));
  if (words.length) {
    const found = await Promise.all(rows.map(async (row) => ({ ...row, snippet: await said(row, words) })));
    rows = found.filter((row) => row.snippet !== null);
  }
  const rest = [["step", true], ["run", false], ["kind", true], ["row", false]].filter(([name]) => name !== sort);
  const keys = [[sort, order !== "asc"], ...rest];
  rows = rows.toSorted((a, b) => keys.reduce((found, [name, descending]) => found || compare(a[name], b[name], descending), 0));
  const mean = (name) => {
    const values = rows.map((row) => row[name]).filter((value) => value !== null);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  };
  const stops = {};
  for (const row of rows) stops[row.stop] = (stops[row.stop] || 0) + 1;
  return { total: rows.length, rows: rows.slice(+offset, +offset + +limit), pending: 0, problems: index.problems, means: Object.fromEntries(index.numbers.map((name) => [name, mean(name)])), stops };
}

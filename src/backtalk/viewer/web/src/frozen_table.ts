// Select and sort rows of the table as backtalk/viewer/live/query.py does, where there is no server.

import type { Maybe, Row, Table } from "./answers";
import type { Question } from "./api";

export interface Facts {
  rows: Row[];
  problems: string[];
  numbers: string[]; // names of columns
  texts: string[];
}

interface Condition {
  field: string;
  op: string;
  value: string;
}

type Value = string | Maybe | object | undefined;

const TERM = /(?:([a-z_]+)(:|<=|>=|!=|=|<|>))?(?:"([^"]*)"?|(\S+))/g;
const isNumber = (text: string) => text.trim() !== "" && Number.isFinite(Number(text));
const fact = (row: Row, name: string) => row[name as keyof Row] as Value;

export async function select(
  facts: Facts,
  asked: Question,
  said: (row: Row, words: string[]) => Promise<string | null>,
): Promise<Table> {
  const { conditions, words } = parse(String(asked.q ?? ""), facts);
  const chosen = asked.runs ? new Set(String(asked.runs).split("\n")) : null;
  let rows = facts.rows.filter((row) => !chosen || chosen.has(row.run));
  rows = rows.filter((row) => conditions.every((condition) => holds(row, condition, facts)));
  if (words.length) {
    const found = await Promise.all(rows.map(async (row) => ({ ...row, snippet: await said(row, words) })));
    rows = found.filter((row) => row.snippet !== null);
  }
  rows = sorted(rows, String(asked.sort ?? "step"), asked.order !== "asc");
  const stops: Record<string, number> = {};
  for (const row of rows) stops[row.stop] = (stops[row.stop] || 0) + 1;
  const offset = Number(asked.offset ?? 0);
  return {
    total: rows.length,
    rows: rows.slice(offset, offset + Number(asked.limit ?? 100)),
    pending: 0,
    problems: facts.problems,
    means: Object.fromEntries(facts.numbers.map((name) => [name, mean(rows, name)])),
    stops,
  };
}

function parse(text: string, facts: Facts): { conditions: Condition[]; words: string[] } {
  const conditions: Condition[] = [];
  const words: string[] = [];
  for (const [whole, field, op, quoted, bare] of text.matchAll(TERM)) {
    const value = quoted ?? bare;
    const asNumber = facts.numbers.includes(field) && isBound(op, value);
    const asText = facts.texts.includes(field) && [":", "=", "!="].includes(op);
    if (field === undefined && value === "failed") conditions.push({ field: "stop", op: ":", value: "failed" });
    else if (asNumber || asText) conditions.push({ field, op, value });
    else if (whole.replaceAll('"', "")) words.push(field !== undefined ? whole : value);
  }
  return { conditions, words };
}

function isBound(op: string, value: string): boolean {
  if (/[<>]/.test(op)) return isNumber(value);
  return value.split(",").every((part) => {
    return part.includes("..") ? part.split("..").every((end) => end === "" || isNumber(end)) : isNumber(part);
  });
}

function holds(row: Row, { field, op, value }: Condition, facts: Facts): boolean {
  const found = fact(row, field);
  if (facts.texts.includes(field)) return textHolds(found, op, value);
  if (typeof found !== "number") return false;
  if (op === "<") return found < +value;
  if (op === "<=") return found <= +value;
  if (op === ">") return found > +value;
  if (op === ">=") return found >= +value;
  const fits = value.split(",").some((part) => {
    if (!part.includes("..")) return found === Number(part);
    const [low, high] = part.split("..");
    return (low === "" || found >= +low) && (high === "" || found <= +high);
  });
  return op === "!=" ? !fits : fits;
}

function textHolds(found: Value, op: string, value: string): boolean {
  const text = typeof found === "string" ? found : found ? JSON.stringify(found) : "";
  const fits = value.split(",").some((part) => {
    return op === ":" ? text.toLowerCase().includes(part.toLowerCase()) : text === part;
  });
  return op === "!=" ? !fits : fits;
}

function sorted(rows: Row[], sort: string, descending: boolean): Row[] {
  const rest: [string, boolean][] = [
    ["step", true],
    ["run", false],
    ["kind", true],
    ["row", false],
  ];
  const keys = [[sort, descending] as const, ...rest.filter(([name]) => name !== sort)];
  return rows.toSorted((a, b) => {
    return keys.reduce((order, [name, down]) => order || compare(fact(a, name), fact(b, name), down), 0);
  });
}

function compare(a: Value, b: Value, descending: boolean): number {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1; // unknown comes last, whatever the order
  if (b === null || b === undefined) return -1;
  return (a < b ? -1 : 1) * (descending ? -1 : 1);
}

function mean(rows: Row[], name: string): Maybe {
  const values = rows.map((row) => fact(row, name)).filter((value) => typeof value === "number");
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

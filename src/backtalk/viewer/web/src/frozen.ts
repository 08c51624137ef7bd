// Answer from the page itself, where `backtalk view --export` or `report` wrote the answers into it.

import type { Answers, Curves, Rollout, Row, Tokens, World } from "./answers";
import type { Question } from "./api";
import { type Facts, select } from "./frozen_table";

interface Held {
  index: string;
  rollouts: Record<string, string>; // by key
}

interface Index extends Facts {
  written: string;
  sources: Answers["sources"];
  curves: Record<string, Curves>;
  knowledge: Answers["knowledge"];
  world: Record<string, World>; // by the two checkpoints that are compared
}

interface Opened {
  rollout: Rollout;
  tokens: Tokens;
  messages: unknown[];
}

const place = document.getElementById("frozen");
const held: Held | null = place && JSON.parse(place.textContent!);
export const isFrozen = held !== null;

async function unpack<Data>(text: string): Promise<Data> {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const unpacked: Promise<Index> | null = held && unpack<Index>(held.index);
export const written = async () => (await unpacked)?.written ?? "";

const opened = new Map<string, Promise<Opened>>();
const keyOf = ({ run, part, row }: Question | Row) => `${run}\n${part}\n${row}`;

async function open(which: Question | Row): Promise<Opened> {
  const key = keyOf(which);
  if (!(key in held!.rollouts)) {
    throw new Error(
      "This rollout is not in this file, which holds the last and first steps, as many as fit. `backtalk view` shows all of them.",
    );
  }
  if (!opened.has(key)) opened.set(key, unpack<Opened>(held!.rollouts[key]));
  return opened.get(key)!;
}

export async function answer(name: keyof Answers, params: Question): Promise<unknown> {
  const index = (await unpacked)!;
  switch (name) {
    case "sources":
      return index.sources;
    case "curves":
      return known(index.curves[String(params.run)], "This run's curves could not be read.");
    case "knowledge":
      return index.knowledge;
    case "studies":
      return index.world[""].studies;
    case "world":
      return index.world[`${params.before}\n${params.after}`] || index.world[""];
    case "rollouts":
      return select(index, params, said);
    case "rollout":
      return (await open(params)).rollout;
    case "tokens":
      return (await open(params)).tokens;
    case "record":
      return record(await open(params), index);
  }
}

function known<Data>(found: Data | undefined, problem: string): Data {
  if (found === undefined) throw new Error(problem);
  return found;
}

// The text around the first word, where all words were said; null elsewhere, and of rollouts that are not in this file.
async function said(row: Row, words: string[]): Promise<string | null> {
  if (!(keyOf(row) in held!.rollouts)) return null;
  const { rollout } = await open(row);
  const text = rollout.segments.map((segment) => segment.text).join("");
  const low = text.toLowerCase();
  if (!words.every((word) => low.includes(word.toLowerCase()))) return null;
  const at = low.indexOf(words[0].toLowerCase());
  return text
    .slice(Math.max(0, at - 60), at + words[0].length + 60)
    .replace(/\s+/g, " ")
    .trim();
}

// The trajectory as files keep it, with its weights and scores.
function record({ rollout, tokens, messages }: Opened, index: Index): unknown {
  const numbers = new Map(index.sources.roles.map(({ role }, place) => [role, place]));
  const roles = rollout.segments.flatMap(({ role, start, end }) => Array(end - start).fill(numbers.get(role)));
  const scores = Object.entries(tokens.scores).map(([name, { logprobs }]) => [name, logprobs]);
  return {
    task_id: rollout.task,
    sample_index: rollout.sample,
    policy_version: rollout.version,
    reward: rollout.reward,
    stop_reason: rollout.stop,
    failure: rollout.failure,
    token_ids: tokens.ids,
    roles,
    logprobs: tokens.logprobs,
    segments: rollout.segments.map(({ role, start, end, sampled, turn, tool, branch }) => {
      return { role, length: end - start, sampled, turn, tool, branch };
    }),
    messages,
    stats: rollout.stats,
    weights: tokens.policy && { advantage: rollout.advantage, policy: tokens.policy, world: tokens.world },
    scores: Object.fromEntries(scores),
  };
}

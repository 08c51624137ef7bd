// What the server answers, as backtalk/viewer/live/answers.py writes it.

export type Role = "CONTEXT" | "TEMPLATE" | "ACTION" | "ENV_OUTPUT" | "WARNING";
export type Maybe = number | null;
type Expected = [text: string, logprob: number];

export interface Answers {
  sources: { sources: Source[]; roles: { role: Role; meaning: string }[] };
  curves: Curves;
  rollouts: Table;
  world: World;
  knowledge: Knowledge[];
  studies: Study[];
  rollout: Rollout;
  tokens: Tokens;
  record: unknown;
}

// ---------------------------------------------------------------- runs and files

export interface Source {
  name: string;
  kind: "run" | "file";
  refused: number;
  problem?: string;
  // Of runs only.
  arm: string | null;
  seed: Maybe;
  done: number;
  steps: number;
  state: "running" | "finished" | "stopped" | "unreadable";
  model: string;
  tasks: string;
}

export interface Interval {
  value: number;
  low: Maybe;
  high: Maybe;
}

export interface Evaluation {
  step: number;
  samples_per_task: Maybe;
  [metric: string]: Interval | Maybe | undefined;
}

export interface Curves {
  name: string;
  steps: number[];
  seconds: number[];
  tokens: number[];
  metrics: Record<string, Maybe[]>;
  evaluations: Evaluation[];
  arm_curves: { over?: string; curves?: Record<string, (Interval & { step: number })[]> };
  warnings: { step: number; text: string }[];
  settings: Record<string, unknown>;
}

// ---------------------------------------------------------------- the table

export interface Failure {
  phase: string;
  error: string;
  message: string;
  traceback?: string; // of one rollout, not of a row
}

export interface Row {
  run: string;
  part: string;
  row: number;
  kind: "train" | "eval" | "file";
  step: Maybe;
  task: string;
  group: number;
  sample: number;
  reward: Maybe;
  advantage: Maybe;
  stop: string;
  failure: Failure | null;
  turns: number;
  tokens: number;
  invalid: Maybe;
  surprise: Maybe;
  confused: Maybe; // turns in which the policy wrote the format of observations
  snippet?: string | null;
}

export interface Table {
  total: number;
  rows: Row[];
  pending: number;
  problems: string[];
  means: Record<string, Maybe>;
  stops: Record<string, number>;
}

// ---------------------------------------------------------------- one rollout

export interface Call {
  tool: string;
  arguments: Record<string, unknown>;
}

export interface Segment {
  role: Role;
  turn: Maybe;
  tool: string | null;
  branch: number;
  start: number;
  end: number;
  sampled: boolean;
  text: string;
  ce?: Record<string, number>;
  logprob?: number;
  policy?: number;
  policy_tokens?: number;
  world?: number;
  world_tokens?: number;
  action?: { thinking?: string; said?: string; calls?: Call[] };
}

export interface Surprise {
  at: number;
  before: string;
  text: string;
  nats: number;
  expected: Expected[];
  elsewhere: Record<string, number>;
}

export interface RoleCount {
  role: Role;
  tokens: number;
  policy_tokens?: number;
  policy_sum?: number;
  world_tokens?: number;
  world_sum?: number;
}

export interface Rollout {
  run: string;
  part: string;
  row: number;
  kind: Row["kind"];
  step: Maybe;
  task: string;
  sample: number;
  group: number;
  version: number;
  reward: Maybe;
  advantage: Maybe;
  trained: boolean;
  stop: string;
  failure: Failure | null;
  turns: number;
  tokens: number;
  branches: number;
  stats: Record<string, number>;
  tokens_of: string | null;
  has_text: boolean;
  compared: boolean;
  segments: Segment[];
  roles: RoleCount[];
  findings: { kind: string; meaning: string; tokens: number; positions: number[] }[];
  surprises: Record<string, Surprise[]>;
  siblings: Row[];
}

export interface Tokens {
  ids: number[];
  texts: string[];
  logprobs: Maybe[];
  policy: number[] | null;
  world: number[] | null;
  scores: Record<string, { logprobs: number[]; expected: Record<number, Expected[]> }>;
}

// ---------------------------------------------------------------- the world model, and studies

export interface Checkpoint {
  name: string;
  tokens: number;
  ce: Maybe;
  rows: { tool: string; kind: string; tokens: number; ce: number }[];
  bins: { tokens: number; sure: number; right: number }[];
  calibration_error: Maybe;
}

export interface Example {
  run: string;
  part: string;
  row: number;
  task: string;
  at: number;
  gain: number;
  text_before: string;
  text: string;
  nats: [number, number];
  expected: [string[], string[]];
}

export interface World {
  checkpoints: Checkpoint[];
  rollouts: number;
  before: string;
  after: string;
  better: Example[];
  worse: Example[];
  pending: number;
  problems: string[];
  studies: Study[];
}

// A probe of one policy: what a command was answered, and what another one was; cross-entropies in nats a token.
export interface Probe {
  task_id: string;
  key: string; // the same in all runs of a study
  command: string;
  true: string;
  true_ce: number;
  other: string | null;
  other_ce: Maybe;
  written: string; // by the policy, in place of the answer
}

export interface Dreamed {
  step: number;
  command: string;
  expected: string;
  actual: string;
  ce: Maybe;
}

type Estimates = Record<string, Interval | null>;

export interface Knowledge {
  run: string;
  measured: { set: string; steps: [number, number]; first: Estimates | null; last: Estimates | null }[];
  examples: { first?: Probe[]; last?: Probe[] };
  dreams: Dreamed[];
}

interface Compared {
  metric: string;
  arm: string;
  p?: Maybe;
  p_holm?: Maybe;
}

type Estimated<Names extends string> = Compared & { [name in Names]?: Interval | null };

export type Result = Estimated<"before" | "after" | "change" | "against_first" | "over_run" | "over_run_against_first">;

export interface Study {
  study: string;
  interval: string;
  seeds: number[];
  results: Result[];
  scores?: Estimated<"iqm" | "improvement">[];
  equal?: (Estimated<"value" | "against_first"> & { unit: string; amount: number })[];
  reached?: (Estimated<"speedup"> & { unit: string; amounts: Maybe[]; ended: number[] })[];
  reach_rule?: string;
}

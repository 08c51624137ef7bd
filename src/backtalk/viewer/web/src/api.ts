// Ask the server, or the page itself where it holds the answers.
// The browser keeps answers and asks with their ETag, so repeating a question is cheap.

import type { Answers } from "./answers";
import { answer, isFrozen } from "./frozen";

export type Question = Record<string, string | number | null | undefined>;

export async function ask<Name extends keyof Answers>(name: Name, params: Question = {}): Promise<Answers[Name]> {
  if (isFrozen) return (await answer(name, params)) as Answers[Name];
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(params)) if (value || value === 0) query.set(key, String(value));
  const response = await fetch(`/api/${name}?${query}`, { cache: "no-cache" });
  const data = await response.json();
  if (!response.ok) throw new Error(data.error || response.statusText);
  return data;
}

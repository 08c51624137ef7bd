// Ask the server, or the page itself where it holds the answers. The browser keeps answers and asks with their ETag, so repeating a question is cheap.

import { answer, isFrozen } from "./frozen.js";

export async function ask(name, params = {}, signal = undefined) {
  if (isFrozen) return answer(name, params);
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== ""));
  const response = await fetch(`/api/${name}?${query}`, { signal, cache: "no-cache" });
  const data = await response.json();
  if (!response.ok) throw new Error(data.error || response.statusText);
  return data;
}

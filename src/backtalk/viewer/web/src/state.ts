// The whole state of the page is in its address: #/page?name=value. Every state has a link, and Back works.

type Value = string | number | boolean | null | undefined;
export type Params = Record<string, Value | Value[]>;

export function read(): { page: string; params: URLSearchParams } {
  const [page, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { page, params: new URLSearchParams(query || "") };
}

export function link(page: string, params: Params = {}): string {
  return address(page, put(new URLSearchParams(), params));
}

export function go(page: string, params: Params = {}): void {
  location.hash = link(page, params);
}

// Change some parameters of the address; a null or empty one goes. Without `push` the step is not in the history.
export function change(changes: Params, { push = false } = {}): void {
  const { page, params } = read();
  for (const name of Object.keys(changes)) params.delete(name);
  const changed = address(page, put(params, changes));
  if (push) location.hash = changed;
  else history.replaceState(null, "", changed);
}

function put(query: URLSearchParams, params: Params): URLSearchParams {
  for (const [name, value] of Object.entries(params)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) {
        query.append(name, each === true ? "1" : String(each));
      }
    }
  }
  return query;
}

function address(page: string, query: URLSearchParams): string {
  const text = query.toString();
  return `#/${page}${text ? `?${text}` : ""}`;
}

// ---------------------------------------------------------------- what all pages are given, and give back

import type { Source } from "./answers";

export interface Context {
  sources: Source[];
  colours: Map<string, string>; // by source
  dashes: Map<string, number[]>;
  // The names of the sources that the address selects: all of them, where it names none.
  selected(params: URLSearchParams): string[];
  // The same as a question has it: nothing where all are selected.
  asked(): string;
}

export type Keys = Record<string, () => unknown>;

export interface Page {
  keys: Keys;
  refresh?: () => unknown; // there is something new
  close?: () => void;
}

export type Show = (main: HTMLElement, params: URLSearchParams, context: Context) => Promise<Page>;

// Build elements. Text goes in as text nodes only, never as HTML: rollouts hold whatever an environment said.

export type Child = Node | string | number | false | null | undefined | Child[];

interface Props {
  class?: string | null;
  style?: Record<string, string>;
  onclick?: (event: MouseEvent) => unknown;
  oninput?: (event: Event) => unknown;
  onchange?: (event: Event) => unknown;
  [attribute: string]: unknown;
}

export function h<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  props: Props = {},
  ...children: Child[]
): HTMLElementTagNameMap[Tag] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value as EventListener);
    else if (name === "class") element.className = String(value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && typeof value !== "string") Reflect.set(element, name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...flat(children));
  return element;
}

export function svg(tag: string, props: Record<string, string | number>, ...children: Node[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

export function replace(element: Element, ...children: Child[]): void {
  element.replaceChildren(...flat(children));
}

function flat(children: Child[]): (Node | string)[] {
  const found: (Node | string)[] = [];
  for (const child of children) {
    if (Array.isArray(child)) found.push(...flat(child));
    else if (child instanceof Node) found.push(child);
    else if (child !== null && child !== undefined && child !== false && child !== "") found.push(String(child));
  }
  return found;
}

// A square in the colour of a run, an arm or a checkpoint.
export const swatch = (colour: string): HTMLElement => h("span", { class: "swatch", style: { background: colour } });

// The element of the page's own HTML that has an id.
export const byId = (id: string): HTMLElement => document.getElementById(id)!;

const probe = h("i", { hidden: true });

// A colour of the style sheet as it is now, dark or light: light-dark() is resolved only where something has the colour.
export function colour(name: string): string {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

// What was typed or chosen.
export const entered = (event: Event): string => (event.target as HTMLInputElement | HTMLSelectElement).value;

export function select(
  label: string,
  options: [value: string, title: string][],
  chosen: string,
  set: (value: string) => void,
) {
  const made = options.map(([value, title]) => h("option", { value, selected: value === chosen }, title));
  return h("select", { "aria-label": label, onchange: (event) => set(entered(event)) }, made);
}

// A table that can be scrolled sideways, also by keys.
export function table(title: string, heads: Child[], rows: Child[][], className = "kinds"): HTMLElement {
  const body = rows.map(([first, ...cells]) => {
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, first),
      cells.map((cell) => h("td", {}, cell)),
    );
  });
  const head = h(
    "tr",
    {},
    heads.map((text) => h("th", { scope: "col" }, text)),
  );
  const made = h("table", { class: className }, h("thead", {}, head), h("tbody", {}, body));
  return h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": title }, made);
}

// ---------------------------------------------------------------- numbers

export function number(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100000)) {
    return value
      .toExponential(digits - 1)
      .replace("e+", "e")
      .replace("-", "−");
  }
  return String(+value.toPrecision(digits)).replace("-", "−");
}

export function signed(value: number | null | undefined, digits = 3): string {
  return (typeof value === "number" && value > 0 ? "+" : "") + number(value, digits);
}

export const plural = (count: number, word: string) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
export const percent = (share: number, digits = 3) => `${number(100 * share, digits)} %`;

// ---------------------------------------------------------------- text

// Characters that change how text is laid out without being seen, and halves of characters.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;

function picture(character: string): string {
  const code = character.codePointAt(0)!;
  if (code < 0x20) return `^${String.fromCharCode(code + 64)}`;
  if (code === 0x7f) return "^?";
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

// A text as nodes in which hidden characters are pictures.
export function visible(text: string): Child[] {
  const nodes: Child[] = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(h("span", { class: "hidden-char", title: "a character that cannot be seen" }, picture(match[0])));
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

// A short text as code, with its newlines as \n.
export const quoted = (text: string) => h("code", {}, visible(JSON.stringify(text).slice(1, -1)));

// ---------------------------------------------------------------- telling

let announced = 0;

export function announce(text: string): void {
  const place = byId("announcer");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(announced);
  announced = window.setTimeout(() => place.classList.remove("shown"), 1600);
}

export async function copy(text: string): Promise<void> {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
  } catch {
    announce("The browser did not allow copying");
  }
}

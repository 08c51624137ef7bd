// Show output as a terminal shows it: colours, carriage returns, backspaces, moves within lines. Nothing else is obeyed.

import { type Child, h, visible } from "./dom";

const SEQUENCE =
  /\u001b(?:\[([0-9;:?<=>]*)[ -/]*([@-~])|\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|[PX^_][^\u001b]*(?:\u001b\\)?|[ -/]*[0-~])|\u009b([0-9;:?]*)([@-~])/y;
const TAB = 8;
const MOST_RIGHT = 2000; // columns

const FLAGS = ["bold", "dim", "italic", "underline", "strike", "inverse"] as const;
type Flag = (typeof FLAGS)[number];
type Colour = number | string | undefined; // a number of the palette, or a colour of its own
type Style = Partial<Record<Flag, boolean>> & { fg?: Colour; bg?: Colour };

const ON: Record<number, Flag> = { 1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike" };
const OFF: Record<number, Flag[]> = {
  22: ["bold", "dim"],
  23: ["italic"],
  24: ["underline"],
  27: ["inverse"],
  29: ["strike"],
};

class Screen {
  lines: [character: string, style: Style][][] = [[]];
  row = 0;
  column = 0;
  style: Style = {};

  put(character: string): void {
    const line = this.lines[this.row];
    while (line.length < this.column) line.push([" ", {}]);
    line[this.column++] = [character, this.style];
  }

  newline(): void {
    this.row += 1;
    this.column = 0;
    if (this.row === this.lines.length) this.lines.push([]);
  }

  command(argument: string, letter: string): void {
    const given = argument.split(/[;:]/).map((part) => parseInt(part, 10));
    const count = Math.max(1, given[0] || 1);
    const line = this.lines[this.row];
    if (letter === "m") this.style = restyle(this.style, given);
    else if (letter === "C") this.column = Math.min(this.column + count, MOST_RIGHT);
    else if (letter === "D") this.column = Math.max(0, this.column - count);
    else if (letter === "G") this.column = Math.min(count - 1, MOST_RIGHT);
    else if (letter === "A") this.row = Math.max(0, this.row - count);
    else if (letter === "B") this.row = Math.min(this.lines.length - 1, this.row + count);
    else if (letter === "K" && !given[0]) line.length = Math.min(line.length, this.column);
    else if (letter === "K" && given[0] === 2) line.length = 0;
  }
}

function restyle(before: Style, codes: number[]): Style {
  let style: Style = { ...before };
  for (let i = 0; i < codes.length; i++) {
    const code = codes[i] || 0;
    if (code === 0) style = {};
    else if (ON[code]) style[ON[code]] = true;
    else if (OFF[code]) for (const flag of OFF[code]) style[flag] = false;
    else if (code === 38 || code === 48) {
      const name = code === 38 ? "fg" : "bg";
      if (codes[i + 1] === 5) style[name] = indexed(codes[(i += 2)]);
      else if (codes[i + 1] === 2) {
        const parts = codes.slice(i + 2, i + 5).map((part) => Math.min(255, part || 0));
        style[name] = `rgb(${parts.join(",")})`;
        i += 4;
      }
    } else if (code >= 30 && code <= 39) style.fg = code === 39 ? undefined : code - 30;
    else if (code >= 40 && code <= 49) style.bg = code === 49 ? undefined : code - 40;
    else if (code >= 90 && code <= 97) style.fg = code - 82;
    else if (code >= 100 && code <= 107) style.bg = code - 92;
  }
  return style;
}

// The colour of a palette of 256.
function indexed(index: number): Colour {
  if (!(index >= 0 && index < 256)) return undefined;
  if (index < 16) return index;
  if (index >= 232) {
    const grey = 8 + (index - 232) * 10;
    return `rgb(${grey},${grey},${grey})`;
  }
  const level = (part: number) => (part ? 55 + part * 40 : 0);
  const rest = index - 16;
  return `rgb(${level(Math.floor(rest / 36))},${level(Math.floor(rest / 6) % 6)},${level(rest % 6)})`;
}

function render(text: string, style: Style): Child {
  const classes: string[] = FLAGS.filter((flag) => style[flag]);
  const colours: Record<string, string> = {};
  for (const [name, property] of [
    ["fg", "color"],
    ["bg", "backgroundColor"],
  ] as const) {
    const value = style[name];
    if (typeof value === "number") classes.push(`${name}${value}`);
    else if (value) colours[property] = value;
  }
  const nodes = visible(text);
  if (!classes.length && !Object.keys(colours).length) return nodes;
  return h("span", { class: classes.join(" "), style: colours }, nodes);
}

// The text as nodes. Lines keep their newline, so that what is copied is the text.
export function terminal(text: string): Child[] {
  if (!/[\u0008\u000d\u001b\u009b\t]/.test(text)) return visible(text);
  const screen = new Screen();
  const characters = text.replace(/\r+\n/g, "\n");
  for (let i = 0; i < characters.length;) {
    const character = String.fromCodePoint(characters.codePointAt(i)!);
    if (character === "\u001b" || character === "\u009b") {
      SEQUENCE.lastIndex = i;
      const match = SEQUENCE.exec(characters);
      if (match) {
        const letter = match[2] || match[4];
        if (letter) screen.command(match[1] ?? match[3] ?? "", letter);
        i = SEQUENCE.lastIndex;
        continue;
      }
    }
    if (character === "\n") screen.newline();
    else if (character === "\r") screen.column = 0;
    else if (character === "\b") screen.column = Math.max(0, screen.column - 1);
    else if (character === "\t") {
      do screen.put(" ");
      while (screen.column % TAB);
    } else screen.put(character);
    i += character.length;
  }
  return screen.lines.map((line, index) => [index ? "\n" : null, spans(line)]);
}

// Characters of one style after another come together.
function spans(line: Screen["lines"][number]): Child[] {
  const nodes: Child[] = [];
  for (let from = 0; from < line.length;) {
    const style = line[from][1];
    let to = from;
    let text = "";
    while (to < line.length && line[to][1] === style) text += line[to++][0];
    nodes.push(render(text, style));
    from = to;
  }
  return nodes;
}

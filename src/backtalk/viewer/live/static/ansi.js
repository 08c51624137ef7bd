// Show output as a terminal shows it: colours, carriage returns, backspaces, moves within lines. Nothing else is obeyed.

import { h, visible } from "./dom.js";

const SEQUENCE = /\u001b(?:\[([0-9;:?<=>]*)[ -/]*([@-~])|\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|[PX^_][^\u001b]*(?:\u001b\\)?|[ -/]*[0-~])|\u009b([0-9;:?]*)([@-~])/y;
const TAB = 8;

class Screen {
  constructor() {
    this.lines = [[]];
    this.row = 0;
    this.column = 0;
    this.style = {};
  }

  put(character) {
    const line = this.lines[this.row];
    while (line.length < this.column) line.push([" ", {}]);
    line[this.column++] = [character, this.style];
  }

  newline() {
    this.row += 1;
    this.column = 0;
    if (this.row === this.lines.length) this.lines.push([]);
  }

  command(argument, letter) {
    const given = argument.split(/[;:]/).map((part) => parseInt(part, 10));
    const count = Math.max(1, given[0] || 1);
    const line = this.lines[this.row];
    if (letter === "m") this.style = restyle(this.style, given);
    else if (letter === "C") this.column += Math.min(count, 500);
    else if (letter === "D") this.column = Math.max(0, this.column - count);
    else if (letter === "G") this.column = Math.min(count - 1, 2000);
    else if (letter === "A") this.row = Math.max(0, this.row - count);
    else if (letter === "B") this.row = Math.min(this.lines.length - 1, this.row + count);
    else if (letter === "K" && !given[0]) line.length = Math.min(line.length, this.column);
    else if (letter === "K" && given[0] === 2) line.length = 0;
  }
}

function restyle(before, codes) {
  const style = { ...before };
  for (let i = 0; i < codes.length; i++) {
    const code = codes[i] || 0;
    if (code === 0) for (const name of Object.keys(style)) delete style[name];
    else if (code === 1) style.bold = true;
    else if (code === 2) style.dim = true;
    else if (code === 3) style.italic = true;
    else if (code === 4) style.underline = true;
    else if (code === 7) style.inverse = true;
    else if (code === 9) style.strike = true;
    else if (code === 22) style.bold = style.dim = false;
    else if (code === 23) style.italic = false;
    else if (code === 24) style.underline = false;
    else if (code === 27) style.inverse = false;
    else if (code >= 30 && code <= 37) style.fg = code - 30;
    else if (code >= 90 && code <= 97) style.fg = code - 82;
    else if (code === 39) style.fg = undefined;
    else if (code >= 40 && code <= 47) style.bg = code - 40;
    else if (code >= 100 && code <= 107) style.bg = code - 92;
    else if (code === 49) style.bg = undefined;
    else if (code === 38 || code === 48) {
      const name = code === 38 ? "fg" : "bg";
      if (codes[i + 1] === 5) style[name] = indexed(codes[(i += 2)]);
      else if (codes[i + 1] === 2) {
        style[name] = `rgb(${codes.slice(i + 2, i + 5).map((x) => Math.min(255, x || 0)).join(",")})`;
        i += 4;
      }
    }
  }
  return style;
}

function indexed(index) {
  if (!(index >= 0 && index < 256)) return undefined;
  if (index < 16) return index;
  if (index >= 232) return `rgb(${Array(3).fill(8 + (index - 232) * 10).join(",")})`;
  const level = (x) => (x ? 55 + x * 40 : 0);
  const rest = index - 16;
  return `rgb(${level(Math.floor(rest / 36))},${level(Math.floor(rest / 6) % 6)},${level(rest % 6)})`;
}

function render(text, style) {
  const classes = ["bold", "dim", "italic", "underline", "strike", "inverse"].filter((name) => style[name]);
  const colours = {};
  for (const [name, property] of [["fg", "color"], ["bg", "backgroundColor"]]) {
    const value = style[name];
    if (typeof value === "number") classes.push(`${name}${value}`);
    else if (value) colours[property] = value;
  }
  const nodes = visible(text);
  return classes.length || Object.keys(colours).length ? [h("span", { class: classes.join(" "), style: colours }, nodes)] : nodes;
}

// The text as nodes. Lines keep their newline, so that what is copied is the text.
export function terminal(text) {
  if (!/[\u0008\u000d\u001b\u009b\t]/.test(text)) return visible(text);
  const screen = new Screen();
  const characters = text.replace(/\r+\n/g, "\n");
  for (let i = 0; i < characters.length; ) {
    const character = characters[i];
    if (character === "\u001b" || character === "\u009b") {
      SEQUENCE.lastIndex = i;
      const match = SEQUENCE.exec(characters);
      if (match) {
        if (match[2] || match[4]) screen.command(match[1] ?? match[3] ?? "", match[2] || match[4]);
        i = SEQUENCE.lastIndex;
        continue;
      }
    }
    if (character === "\n") screen.newline();
    else if (character === "\r") screen.column = 0;
    else if (character === "\b") screen.column = Math.max(0, screen.column - 1);
    else if (character === "\t") do screen.put(" "); while (screen.column % TAB);
    else {
      const whole = String.fromCodePoint(characters.codePointAt(i));
      screen.put(whole);
      i += whole.length;
      continue;
    }
    i += 1;
  }
  const nodes = [];
  screen.lines.forEach((line, index) => {
    if (index) nodes.push("\n");
    for (let from = 0; from < line.length; ) {
      let to = from;
      while (to < line.length && line[to][1] === line[from][1]) to += 1;
      nodes.push(...render(line.slice(from, to).map((cell) => cell[0]).join(""), line[from][1]));
      from = to;
    }
  });
  return nodes;
}

// All rollouts as a table: conditions and words in one line, sorting by any column, rows made only where one looks.

import { ask } from "./api.js";
import { h, number, plural, replace, signed, visible } from "./dom.js";
import { change, link, read } from "./state.js";

const ROW_PX = 36;
const FOUND_PX = 60; // of a row with the text that was found
const PAGE = 100; // rows of one question
const COLUMNS = [
  ["step", "step", number], ["task", "task", null], ["group", "group", number], ["sample", "sample", number],
  ["reward", "reward", number], ["advantage", "advantage", signed], ["stop", "ended", null],
  ["turns", "turns", number], ["tokens", "tokens", number], ["invalid", "invalid", number], ["surprise", "surprise", number],
];
const HELP = "reward<1   stop:max_turns   surprise>2   step:10..20   kind:eval   failed   \"text that was said\"";

export async function rollouts(main, params, context) {
  const state = { q: params.get("q") || "", sort: params.get("sort") || "step", order: params.get("order") || "desc" };
  let pages = new Map();
  let answer = { total: 0, rows: [], pending: 0, problems: [], means: {}, stops: {} };
  let here = -1;
  let asking = 0;
  const height = () => (wordsOf(state.q).length ? FOUND_PX : ROW_PX);

  const input = h("input", { type: "search", value: state.q, placeholder: HELP, "aria-label": "Conditions and words to search for", spellcheck: "false", autocomplete: "off" });
  const summary = h("p", { class: "summary", role: "status" });
  const problems = h("div", {});
  const heads = h("div", { class: "row heads", role: "row" });
  const space = h("div", { class: "space", role: "rowgroup" });
  const scroller = h("div", { class: "scroller", role: "table", "aria-label": "Rollouts", tabindex: "0" }, heads, space);
  const chips = h("div", { class: "chips" });
  replace(main, h("div", { class: "table-page" }, h("h1", { class: "unseen" }, "Rollouts"), h("div", { class: "filter" }, input, chips), summary, problems, scroller));

  const question = (offset) => ask("rollouts", { q: state.q, sort: state.sort, order: state.order, offset, limit: PAGE, runs: context.selected(read().params).length === context.sources.length ? "" : context.selected(read().params).join("\n") });

  async function load({ keep = false } = {}) {
    const mine = ++asking;
    const first = await question(0);
    if (mine !== asking) return;
    answer = first;
    if (!keep) { here = -1; scroller.scrollTop = 0; }
    pages = new Map([[0, first.rows]]);
    draw();
    if (first.pending) setTimeout(() => mine === asking && load({ keep: true }), 50);
  }

  async function fill(page) {
    pages.set(page, null);
    const mine = asking;
    const more = await question(page * PAGE);
    if (mine !== asking) return;
    pages.set(page, more.rows);
    drawRows();
  }

  const rowAt = (index) => pages.get(Math.floor(index / PAGE))?.[index % PAGE];
  const address = (row) => link("rollout", { run: row.run, part: row.part, row: row.row });

  function cell(row, [name, , format]) {
    if (name === "task") return h("span", { class: "cell cell-task", role: "cell" }, h("a", { href: address(row), tabindex: "-1" }, visible(row.task)), several() ? h("span", { class: "of" }, row.run) : null);
    if (name === "step") return h("span", { class: "cell", role: "cell" }, row.step === null ? "–" : number(row.step), row.kind === "eval" ? h("span", { class: "kind" }, "eval") : null);
    if (name === "group") return h("span", { class: "cell", role: "cell" }, h("a", { class: "quiet", href: link("group", { run: row.run, part: row.part, group: row.group }), title: "side by side" }, number(row.group)));
    if (name === "stop") return h("span", { class: `cell stop${row.stop === "failed" ? " bad" : ""}`, role: "cell", title: row.failure ? `${row.failure.phase}: ${row.failure.error}: ${row.failure.message}` : "" }, row.failure ? row.failure.error : row.stop.replace("_", " "));
    if (name === "reward") return h("span", { class: "cell", role: "cell" }, row.reward === null ? "–" : [h("span", { class: "reward-bar", "aria-hidden": "true" }, h("span", { style: { width: `${Math.round(100 * Math.min(1, Math.max(0, row.reward)))}%` } })), number(row.reward)]);
    return h("span", { class: `cell${name === "invalid" && row.invalid ? " warn" : ""}`, role: "cell" }, format(row[name]));
  }

  const several = () => context.selected(read().params).length > 1;
  function marked(text) {
    const words = wordsOf(state.q).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (!words.length) return visible(text);
    return text.split(new RegExp(`(${words.join("|")})`, "gi")).map((part, index) => (index % 2 ? h("mark", {}, visible(part)) : visible(part)));
  }

  function drawRows() {
    const px = height();
    const top = Math.max(0, scroller.scrollTop - heads.offsetHeight);
    const from = Math.max(0, Math.floor(top / px) - 8);
    const to = Math.min(answer.total, Math.ceil((top + scroller.clientHeight) / px) + 8);
    const rows = [];
    for (let index = from; index < to; index++) {
      const row = rowAt(index);
      const page = Math.floor(index / PAGE);
      if (!row && !pages.has(page)) fill(page);
      rows.push(h("div", { class: `row${px === FOUND_PX ? " tall" : ""}${index === here ? " here" : ""}${row ? "" : " waiting"}`, role: "row", "aria-rowindex": String(index + 2), style: { top: `${index * px}px` },
        onclick: (event) => { if (row && !event.target.closest("a")) open(index); } }, row ? COLUMNS.map((column) => cell(row, column)) : null,
        row?.snippet ? h("span", { class: "snippet", role: "cell" }, marked(row.snippet)) : null));
    }
    space.style.height = `${answer.total * px}px`;
    scroller.setAttribute("aria-rowcount", String(answer.total + 1));
    replace(space, rows);
  }

  function draw() {
    replace(heads, COLUMNS.map(([name, title]) => h("span", { class: `cell cell-${name}`, role: "columnheader", "aria-sort": state.sort === name ? (state.order === "desc" ? "descending" : "ascending") : "none" },
      h("button", { onclick: () => sortBy(name) }, title, state.sort === name ? h("span", { "aria-hidden": "true" }, state.order === "desc" ? " ↓" : " ↑") : null))));
    const { means } = answer;
    const facts = [plural(answer.total, "rollout")];
    if (answer.total) facts.push(`mean reward ${number(means.reward)}`, `${number(means.turns)} turns`, `${number(means.tokens)} tokens`);
    if (answer.pending) facts.push(`${plural(answer.pending, "file")} still to read`);
    summary.textContent = facts.join(" · ");
    replace(problems, answer.problems.length ? h("details", { class: "notice" }, h("summary", {}, plural(answer.problems.length, "record") + " could not be read"), h("ul", {}, answer.problems.slice(0, 50).map((text) => h("li", {}, visible(text))))) : null);
    drawChips();
    drawRows();
  }

  function drawChips() {
    const chip = (text, term) => {
      const on = state.q.split(/\s+/).includes(term);
      return h("button", { class: "chip", "aria-pressed": String(on), onclick: () => setQuery(on ? state.q.split(/\s+/).filter((part) => part !== term).join(" ") : `${state.q} ${term}`.trim()) }, text);
    };
    const stops = Object.entries(answer.stops).sort((a, b) => b[1] - a[1]).map(([stop, count]) => chip(`${stop.replace("_", " ")} ${number(count)}`, `stop:${stop}`));
    replace(chips, chip("training", "kind:train"), chip("evaluation", "kind:eval"), stops.length > 1 || state.q.includes("stop:") ? stops : null, chip("invalid calls", "invalid>0"));
  }

  function setQuery(text) {
    state.q = text;
    input.value = text;
    change({ q: text });
    load();
  }
  function sortBy(name) {
    state.order = state.sort === name && state.order === "desc" ? "asc" : "desc";
    state.sort = name;
    change({ sort: name, order: state.order });
    load();
  }
  function open(index) {
    const row = rowAt(index);
    if (!row) return;
    try {
      const known = [...pages.entries()].sort((a, b) => a[0] - b[0]).flatMap(([, rows]) => rows || []);
      sessionStorage.setItem("order", JSON.stringify(known.map(({ run, part, row: number_ }) => ({ run, part, row: number_ }))));
      sessionStorage.setItem("table", location.hash);
    } catch { /* without storage [ and ] do nothing */ }
    location.hash = address(row);
  }
  function move(step) {
    here = Math.min(answer.total - 1, Math.max(0, here + step));
    const px = height();
    const top = here * px;
    const end = top + px + heads.offsetHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (end > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = end - scroller.clientHeight;
    drawRows();
  }

  let typed = 0;
  input.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => { state.q = input.value; change({ q: state.q }); load(); }, 250); });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") { input.blur(); scroller.focus(); } });
  scroller.addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  const resized = new ResizeObserver(() => drawRows());
  resized.observe(scroller);
  draw();
  await load();
  return {
    keys: { "/": () => { input.focus(); input.setSelectionRange(input.value.length, input.value.length); }, j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), Enter: () => open(here), s: () => { const row = rowAt(here); if (row) location.hash = link("group", { run: row.run, part: row.part, group: row.group }); } },
    refresh: () => load({ keep: true }),
    close: () => { asking += 1; resized.disconnect(); },
  };
}

export function wordsOf(query) {
  return [...query.matchAll(/"([^"]*)"?|(\S+)/g)].filter((match) => match[1] !== undefined || !/^[a-z_]+(:|<=|>=|!=|=|<|>)/.test(match[2])).map((match) => match[1] ?? match[2]).filter((word) => word !== "failed");
}

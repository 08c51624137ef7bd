// The rollouts of one task beside each other, the best first.

import { ask } from "./api.js";
import { h, number, replace, signed, visible } from "./dom.js";
import { conversation } from "./rollout.js";
import { link } from "./state.js";

const MOST = 32; // conversations on one page

export async function group(main, params, context) {
  const run = params.get("run");
  const part = params.get("part");
  const number_ = params.get("group");
  const step = part.split("-")[1];
  const found = await ask("rollouts", { runs: run, q: `part="${part}" group:${number_}`, sort: "reward", order: "desc", limit: MOST });
  if (!found.rows.length) throw new Error(`There is no group ${number_} in ${part} of ${run} (any more).`);
  const columns = await Promise.all(found.rows.map((row) => ask("rollout", { run, part, row: row.row })));
  const column = (data) => {
    const href = link("rollout", { run, part, row: data.row });
    return h("article", { class: `column${data.failure ? " failed" : ""}` },
      h("header", {}, h("h2", {}, h("a", { href }, `sample ${data.sample}`)),
        h("dl", { class: "facts-row" }, [["reward", number(data.reward)], ["advantage", data.trained ? (data.advantage === null ? "none" : signed(data.advantage)) : "–"], ["ended", data.stop.replace("_", " ")], ["turns", number(data.turns)]].map(([name, value]) => h("div", { class: "fact" }, h("dt", {}, name), h("dd", {}, value))))),
      h("div", { class: "talk compact" }, conversation({ ...data, segments: data.segments.filter((segment) => segment.role !== "CONTEXT" || segment.turn !== null) })));
  };
  const given = columns[0].segments.filter((segment) => segment.role === "CONTEXT" && segment.turn === null && segment.branch === 0);
  const where = part.startsWith("train") ? `training step ${step}` : part.startsWith("eval") ? `evaluation before step ${step}` : "file";
  replace(main, h("div", { class: "group" },
    h("p", { class: "crumbs" }, h("a", { href: link("rollouts", { runs: run }) }, "Rollouts"), ` / ${run} / ${where} / group ${number_}`),
    h("h1", {}, visible(columns[0].task)),
    h("details", { class: "card given" }, h("summary", {}, "What all of them were given"), given.map((segment) => h("pre", { class: "said" }, visible(segment.text)))),
    h("div", { class: "columns", tabindex: "0", role: "region", "aria-label": "Rollouts side by side" }, columns.map(column))));
  const go = (to) => () => (location.hash = link("group", { run, part, group: to }));
  return { keys: { j: go(Number(number_) + 1), k: go(Math.max(0, Number(number_) - 1)), u: () => (location.hash = link("rollouts", { runs: run })) } };
}

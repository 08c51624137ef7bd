// The rollouts of one task beside each other, the best first.

import type { Rollout } from "./answers";
import { ask } from "./api";
import { conversation } from "./conversation";
import { h, number, replace, signed, visible } from "./dom";
import { fact } from "./facts";
import { go, link, type Page } from "./state";

const MOST = 32; // conversations on one page

export async function group(main: HTMLElement, params: URLSearchParams): Promise<Page> {
  const [run, part, wanted] = ["run", "part", "group"].map((name) => params.get(name) ?? "");
  const q = `part="${part}" group:${wanted}`;
  const found = await ask("rollouts", { runs: run, q, sort: "reward", order: "desc", limit: MOST });
  if (!found.rows.length) throw new Error(`There is no group ${wanted} in ${part} of ${run} (any more).`);
  const all = await Promise.all(found.rows.map(({ row }) => ask("rollout", { run, part, row })));
  const given = all[0].segments.filter(({ role, turn, branch }) => role === "CONTEXT" && turn === null && branch === 0);
  replace(
    main,
    h(
      "div",
      { class: "group" },
      h(
        "p",
        { class: "crumbs" },
        h("a", { href: link("rollouts", { runs: run }) }, "Rollouts"),
        ` / ${run} / ${placeOf(part)} / group ${wanted}`,
      ),
      h("h1", {}, visible(all[0].task)),
      h(
        "details",
        { class: "card given" },
        h("summary", {}, "What all of them were given"),
        given.map(({ text }) => h("pre", { class: "said" }, visible(text))),
      ),
      h(
        "div",
        { class: "columns", tabindex: "0", role: "region", "aria-label": "Rollouts side by side" },
        all.map(column),
      ),
    ),
  );
  const to = (number: number) => () => go("group", { run, part, group: Math.max(0, number) });
  return {
    keys: { j: to(Number(wanted) + 1), k: to(Number(wanted) - 1), u: () => go("rollouts", { runs: run }) },
  };
}

function placeOf(part: string): string {
  const [kind, step] = part.split("-");
  return { train: `training step ${step}`, eval: `evaluation before step ${step}` }[kind] ?? "file";
}

function column(data: Rollout): HTMLElement {
  const { run, part, row, segments } = data;
  const said = segments.filter(({ role, turn }) => role !== "CONTEXT" || turn !== null);
  const advantage = data.trained ? (data.advantage === null ? "none" : signed(data.advantage)) : "–";
  return h(
    "article",
    { class: `column${data.failure ? " failed" : ""}` },
    h(
      "header",
      {},
      h("h2", {}, h("a", { href: link("rollout", { run, part, row }) }, `sample ${data.sample}`)),
      h(
        "dl",
        { class: "facts-row" },
        fact("reward", number(data.reward)),
        fact("advantage", advantage),
        fact("ended", data.stop.replace("_", " ")),
        fact("turns", number(data.turns)),
      ),
    ),
    h("div", { class: "talk compact" }, conversation({ ...data, segments: said })),
  );
}

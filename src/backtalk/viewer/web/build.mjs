// Build the page into a folder, dist/ if none is named: one script, one style sheet, the HTML, and uPlot's licence.

import { copyFileSync, rmSync } from "node:fs";
import { build } from "esbuild";

const out = process.argv[2] ?? "dist";
rmSync(out, { recursive: true, force: true });
await build({
  entryPoints: ["src/app.ts", "src/app.css"],
  outdir: out,
  bundle: true,
  format: "esm",
  target: "es2024",
  charset: "utf8",
  minify: true,
});
copyFileSync("src/index.html", `${out}/index.html`);
copyFileSync("node_modules/uplot/LICENSE", `${out}/uPlot.LICENSE`);

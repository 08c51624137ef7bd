"""Take the pictures of `backtalk view` that docs/viewer.md and the README show.

    scripts/viewer && .venv-viewer/bin/python scripts/viewer_pictures.py --study STUDY --run RUN --row 3 --out docs

STUDY is a folder of runs; RUN is a run that `backtalk score` has scored at two checkpoints, of whose last step one row
is shown. Pictures have a palette of 256 colours, so that they are small. Look at them before they are committed.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import sync_playwright

DESKTOP, PHONE = (1280, 800), (390, 800)
COLOURS = 256
PORT = 7992
# A file, the page it is of (study or run), its address, what is brought into the window, its size, the scheme.
PICTURES: list[tuple[str, str, str, str, tuple[int, int], str]] = [
    ("viewer_overview", "study", "overview?arms=1&smooth={smooth}&find={find}", "canvas", DESKTOP, "light"),
    ("viewer_overview_phone", "study", "overview?arms=1&smooth={smooth}&find={find}", "[data-name]", PHONE, "dark"),
    ("viewer_table", "study", "rollouts?q=&sort=reward&order=desc", ".space .row a", DESKTOP, "light"),
    ("viewer_tokens", "run", "rollout?{place}&tokens=1&pos={pos}", ".token.pinned", DESKTOP, "light"),
    ("viewer_before_after", "run", "rollout?{place}&sides=1&pos={pos}", ".sides .token.pinned", DESKTOP, "light"),
    ("viewer_world_model", "run", "world", ".kinds", DESKTOP, "dark"),
    ("viewer_phone", "run", "rollout?{place}", ".talk .block", PHONE, "dark"),
]


def served(path: Path, port: int) -> subprocess.Popen[bytes]:
    """Serve the page over a path, and return its server once it answers."""
    command = [sys.executable, "-m", "backtalk.cli", "view", str(path), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")})
    for _ in range(600):
        try:
            urlopen(f"http://127.0.0.1:{port}/", timeout=30).close()
            break
        except OSError:
            time.sleep(0.5)
    return server


def take(page: Any, file: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--part", default=None, help="for example train-19; without it, the last step")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--pos", type=int, default=0, help="the token that is selected")
    parser.add_argument("--find", default="", help="which curves the overview shows")
    parser.add_argument("--smooth", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    last = max((int(p.stem.rpartition("_")[2]) for p in (given.run / "groups").glob("*.parquet")), default=0)
    place = f"run={given.run.resolve().name}&part={given.part or f'train-{last}'}&row={given.row}"
    servers = {
        name: served(path, PORT + i) for i, (name, path) in enumerate([("study", given.study), ("run", given.run)])
    }
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, of, address, wait, (width, height), scheme in PICTURES:
                if given.only and name not in given.only:
                    continue
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                page.set_default_timeout(180_000)
                port = PORT + list(servers).index(of)
                filled = address.format(place=place, pos=given.pos, find=given.find, smooth=given.smooth)
                page.goto(f"http://127.0.0.1:{port}/#/{filled}")
                page.wait_for_selector(wait)
                page.wait_for_timeout(2000)
                if name.endswith("phone"):
                    page.locator(wait).first.evaluate("(part) => part.scrollIntoView()")
                page.wait_for_timeout(2000)
                take(page, given.out / f"{name}.png")
                context.close()
            browser.close()
    finally:
        for server in servers.values():
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()

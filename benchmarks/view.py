"""Measure the page over runs of 1,000, 10,000 and 100,000 rollouts, and one rollout of 100,000 tokens.

    python benchmarks/view.py                   # the answers: seconds of the clock and of the processor, memory
    scripts/viewer && .venv-viewer/bin/python benchmarks/view.py --browser    # Chromium too: paint, scrolling

Each size is measured in a process of its own. Files hold 1,000 rollouts each; a question reads files for half a second
at most, so the first answer is of what it had time for, and "all read" is when nothing is left. Frames of a scroll are
their median, their 95th percentile and the longest, and in brackets the mean of what the page's processor spent on one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from backtalk.run.log import RunLog, write_trajectories
from backtalk.trajectory import Segment, TokenRole, Trajectory
from backtalk.viewer.live.answers import Viewer
from backtalk.viewer.live.sources import Library

A_FILE = 1000
TURNS, TOKENS = 4, 40  # of a rollout, and of each of a turn's action and output
LONG = 100_000  # tokens of the long rollout
BASE = Path(str(resources.files("backtalk"))) / "assets" / "base_model" / "tokenizer.json"


def rollout(number: int, tokens: int = TOKENS) -> Trajectory:
    """Return a rollout with text of its own."""
    segments = [Segment(TokenRole.CONTEXT, tuple(range(300, 340)))]
    messages = [{"role": "user", "content": f"Count the lines of file {number}."}]
    for turn in range(TURNS):
        ids = tuple(300 + (number + turn + i) % 700 for i in range(tokens))
        segments += [
            Segment(TokenRole.ACTION, ids, (-0.5,) * tokens, turn),
            Segment(TokenRole.ENV_OUTPUT, ids, None, turn, "bash"),
        ]
        messages += [{"role": "assistant", "content": f"wc -l f{number}"}, {"role": "tool", "content": f"{number} f"}]
    task, stats = f"task-{number % 97}", {"invalid_calls": float(number % 3)}
    reward = (number % 5) / 4
    return Trajectory(
        task_id=task,
        sample_index=number,
        segments=tuple(segments),
        messages=tuple(messages),
        reward=reward,
        stats=stats,
    )


def write_run(folder: Path, rollouts: int) -> Path:
    """Write a run of this many rollouts, and in its last step one long rollout; files are copies of one."""
    log = RunLog(folder)
    log.write_config({"steps": rollouts // A_FILE + 1, "engine": {"model": "base"}, "tasks": {"source": "triage"}})
    log.tokenizer_path.mkdir()
    shutil.copy(BASE, log.tokenizer_path)
    write_trajectories(log.groups_path(0), [rollout(number) for number in range(A_FILE)])
    for step in range(1, rollouts // A_FILE):
        shutil.copy(log.groups_path(0), log.groups_path(step))
    write_trajectories(log.groups_path(rollouts // A_FILE), [rollout(0, LONG // (2 * TURNS))])
    for step in range(rollouts // A_FILE + 1):
        log.write_metrics(step, {"reward": 0.5})
    return folder


FILTER = "reward<0.5 task:task-1"
IS_READ = """(before) => {
    const isRead = document.querySelector(".scroller").ariaBusy === "false";
    return isRead && document.querySelector(".summary").textContent !== before;
}"""
SCROLL = """async () => {
    const table = document.querySelector(".scroller");
    let last = performance.now();
    const frames = [];
    for (let i = 0; i < 120; i++) {
        table.scrollTop = (i / 120) * table.scrollHeight;
        await new Promise(requestAnimationFrame);
        frames.push(performance.now() - last);
        last = performance.now();
    }
    return frames;
}"""


def timed(work: Callable[[], Any]) -> tuple[str, Any]:
    """Return seconds of the clock and of the processor, as text, and the result."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return f"{time.perf_counter() - clock:.3f} ({time.process_time() - processor:.3f})", result


def measure(folder: Path, rollouts: int) -> dict[str, str]:
    """Return what each question takes."""
    library = Library([folder])
    viewer = Viewer(library)
    before = peak_mb(os.getpid())

    def ask(**params: Any) -> dict[str, Any]:
        return viewer.rollouts({name: str(value) for name, value in params.items()})

    def until_read(**params: Any) -> dict[str, Any]:
        while (found := ask(**params))["pending"]:
            pass
        return found

    rows: dict[str, str] = {}
    rows["first answer"], first = timed(ask)
    assert first["rows"]
    rows["all read"], found = timed(until_read)
    assert found["total"] == rollouts + 1, found["problems"]
    rows["filter"], _ = timed(lambda: ask(q="reward<0.5 turns>3 task:task-1"))
    rows["sort"], _ = timed(lambda: ask(sort="reward", order="asc"))
    rows["a page in the middle"], _ = timed(lambda: ask(offset=rollouts // 2))
    rows["search, all files"], found = timed(lambda: until_read(q='"wc -l f7"'))
    rows["search again"], _ = timed(lambda: ask(q='"wc -l f7"'))
    which = {"run": folder.name, "part": "train-0", "row": str(A_FILE - 1)}
    rows["open a rollout"], _ = timed(lambda: viewer.rollout(which))
    which = {"run": folder.name, "part": f"train-{rollouts // A_FILE}", "row": "0"}
    rows[f"open one of {LONG:,} tokens"], _ = timed(lambda: viewer.rollout(which))
    rows["its tokens"], tokens = timed(lambda: json.dumps(viewer.tokens(which)))
    rows["its tokens, MB"] = f"{len(tokens) / 1e6:.1f}"
    rows["memory, MB more"] = f"{peak_mb(os.getpid()) - before:.0f}"
    return rows


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def scrolled(page: Any, script: str) -> str:
    """Return milliseconds a frame of a scroll, median, 95 % and longest, and those of the page's processor."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        found = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")

    before = seconds()
    frames = sorted(page.evaluate(script))
    spent = 1000 * (seconds() - before) / len(frames)
    return f"{frames[len(frames) // 2]:.0f}; {frames[int(0.95 * len(frames))]:.0f}; {frames[-1]:.0f} ({spent:.0f})"


def in_browser(folder: Path, rollouts: int) -> dict[str, str]:
    """Return what a person waits for: paint, rows, a filter, frames of a scroll, tokens; and memory."""
    from playwright.sync_api import sync_playwright

    port = 7990
    command = [sys.executable, "-m", "backtalk.cli", "view", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    rows: dict[str, str] = {}
    try:
        with sync_playwright() as playwright:
            launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = launched.new_page(viewport={"width": 1280, "height": 800})
            for _ in range(600):
                try:
                    page.goto(f"http://127.0.0.1:{port}/#/rollouts")
                    break
                except Exception:  # not listening yet
                    time.sleep(0.3)
            page.goto("about:blank")
            started = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/#/rollouts")
            page.wait_for_selector(".space .row a")
            rows["browser: first rows, s"] = f"{time.perf_counter() - started:.2f}"
            paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            rows["browser: first paint, ms"] = f"{page.evaluate(paint):.0f}"
            page.wait_for_function(IS_READ, arg=None, timeout=300_000)
            rows["browser: all read, s"] = f"{time.perf_counter() - started:.2f}"
            rows["browser: frames of a scroll, ms"] = scrolled(page, SCROLL)
            started = time.perf_counter()
            page.fill(".filter input", FILTER)
            page.wait_for_function(IS_READ, arg=page.locator(".summary").inner_text())
            rows["browser: filter, s"] = f"{time.perf_counter() - started:.2f}"
            started = time.perf_counter()
            page.goto(
                f"http://127.0.0.1:{port}/#/rollout?run={folder.name}&part=train-{rollouts // A_FILE}&row=0&tokens=1"
            )
            page.wait_for_selector(".token")
            rows["browser: tokens of the long rollout, s"] = f"{time.perf_counter() - started:.2f}"
            rows["browser: frames of its scroll, ms"] = scrolled(page, SCROLL.replace(".scroller", "main"))
            rows["browser: memory of scripts, MB"] = f"{page.evaluate('performance.memory.usedJSHeapSize') / 1e6:.0f}"
            rows["server: memory, MB"] = f"{peak_mb(server.pid):.0f}"
            launched.close()
    finally:
        server.terminate()
        server.wait(30)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        (rollouts,) = given.rollouts
        print(json.dumps(measure(given.one, rollouts) | (in_browser(given.one, rollouts) if given.browser else {})))
        return
    columns = {}
    for rollouts in given.rollouts:
        with tempfile.TemporaryDirectory(prefix="backtalk-benchmark-") as folder:
            run = write_run(Path(folder) / "run", rollouts)
            command = [sys.executable, __file__, "--one", str(run), "--rollouts", str(rollouts)]
            command += ["--browser"] if given.browser else []
            columns[rollouts] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{'seconds of the clock (of the processor)':40}" + "".join(f"{n:>18,}" for n in columns))
    for name in next(iter(columns.values())):
        print(f"{name:40}" + "".join(f"{column.get(name, '-'):>18}" for column in columns.values()))


if __name__ == "__main__":
    main()

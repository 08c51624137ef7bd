"""Measure again, on a CPU, what docs/evidence.md reports of this repository's own runs.

    python recipes/reproduce_cpu/run.py [PART...] --out runs/reproduce_cpu

Stopped or killed, the same command goes on: what RESULTS holds is not done again, and studies continue their runs. Each
part writes RESULTS/PART.json with its numbers, machine, commit and commands (RESULTS is OUT/results).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECIPES = Path(__file__).resolve().parents[1]
BACKTALK = [sys.executable, "-m", "backtalk.cli"]
FIVE_SEEDS = [part for seed in range(5) for part in ("--seed", str(seed))]


class Part(NamedTuple):
    """Commands, each with the file whose presence says that it is done, and what reads their numbers.

    ``{out}`` stands for the folder of the part. ``into`` is a file for what the command prints.
    """

    commands: Sequence[tuple[list[str], str]]
    read: Callable[[Path], Any]
    into: str | None = None


def read_study(folder: Path) -> Any:
    """Return the results of a study, without its curves."""
    study = json.loads((folder / "study/study.json").read_text())
    return {key: study[key] for key in ("seeds", "interval", "results", "pairs", "reached")}


def read_world_model(folder: Path) -> Any:
    """Return what was measured before, at step 250 and at the end."""
    arms = json.loads((folder / "results.json").read_text())["arms"]
    return {arm: [row for row in found["curve"] if row["step"] in (0, 250, 400)] for arm, found in arms.items()}


FIRST_STEP = ["--preset", "triage", "--set", "steps=1", "--set", "evaluation.tasks=0"]
PARTS = {
    "demo": Part([([*BACKTALK, "study", "demo", *FIVE_SEEDS, "--out", "{out}/study"], "study/study.json")], read_study),
    "world_only_steps": Part(
        [([*BACKTALK, "study", f"{RECIPES}/world_only_steps/study.yaml", "--out", "{out}/study"], "study/study.json")],
        read_study,
    ),
    "world_only_replay": Part(
        [
            ([*BACKTALK, "train", *FIRST_STEP, "--out", "{out}/first"], "first/checkpoint"),
            ([sys.executable, f"{RECIPES}/world_only_steps/replay.py", "{out}/first"], "replay.txt"),
        ],
        lambda folder: (folder / "replay.txt").read_text().splitlines(),
        into="replay.txt",
    ),
    "world_model": Part(
        [([sys.executable, f"{RECIPES}/world_model/run.py", "--steps", "400", "--out", "{out}"], "results.json")],
        read_world_model,
    ),
}


def do(name: str, part: Part, out: Path, results: Path) -> None:
    """Do what is missing of a part, and write its result."""
    result, folder, started = results / f"{name}.json", out / name, time.monotonic()
    if result.exists():
        print(f"{name}: done already, {result}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for template, made in part.commands:
        command = [word.replace("{out}", str(folder)) for word in template]
        if (folder / made).exists():
            continue
        print(f"{name}: {' '.join(command)}", flush=True)
        if command[3:4] == ["train"]:  # a run that was stopped in its only step begins again
            shutil.rmtree(folder / "first", ignore_errors=True)
        output = subprocess.PIPE if made == part.into else None
        done = subprocess.run(command, check=True, stdout=output, text=True)
        if output is not None:
            (folder / made).write_text(done.stdout)
    about = {"part": name, "commit": commit(), "machine": machine(), "minutes": (time.monotonic() - started) / 60}
    commands = [" ".join(command) for command, _ in part.commands]
    results.mkdir(parents=True, exist_ok=True)
    content = json.dumps(about | {"commands": commands, "numbers": part.read(folder)}, indent=1)
    waiting = result.with_suffix(".partial")
    waiting.write_text(content + "\n")
    waiting.replace(result)
    print(f"{name}: {result}")


def commit() -> str | None:
    """Return the commit of this checkout, with a plus where files differ; None where it is none."""
    try:
        asked = ["git", "-C", str(RECIPES), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Return what numbers and times depend on; ``load`` is the mean number of processes that wanted a core."""
    import torch

    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": f"{platform.machine()}, {cpu}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[2],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the parts that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all without any")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce_cpu"))
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        do(name, PARTS[name], args.out, args.out / "results")


if __name__ == "__main__":
    main()

"""A machine that is not Linux: what works there, and that what does not is said plainly.

It is played by a program that hides what only Linux has: modules' constants and functions, /proc and /sys, bubblewrap.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HIDE = """
import builtins, io, json, os, platform, shutil, signal, socket, sys, threading, time, urllib.request
import asyncio, torch, transformers, pyarrow.parquet, matplotlib.pyplot  # packages that were built for this machine
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from backtalk.language.tokenizer import model_location
AutoModelForCausalLM.from_pretrained(model_location("base"))  # loads its code too
sys.platform, platform.system, platform.machine = "darwin", lambda: "Darwin", lambda: "arm64"
for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING",
             "pidfd_open", "unshare", "setns", "eventfd", "getxattr", "posix_fadvise", "O_TMPFILE", "O_PATH"):
    if hasattr(os, name): delattr(os, name)
for name in ("CLOCK_BOOTTIME",):
    if hasattr(time, name): delattr(time, name)
import fcntl
for name in [n for n in dir(fcntl) if "SEAL" in n or n in ("F_SETPIPE_SZ", "F_GETPIPE_SZ")]: delattr(fcntl, name)
import resource
for name in ("prlimit",):
    if hasattr(resource, name): delattr(resource, name)
def hiding(real):
    def opened(file=".", *args, **more):
        if isinstance(file, (str, os.PathLike)) and str(os.fspath(file)).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return real(file, *args, **more)
    return opened
builtins.open = io.open = hiding(io.open)
os.open, os.listdir = hiding(os.open), hiding(os.listdir)
real_which = shutil.which
shutil.which = lambda name, *args, **more: None if name in ("bwrap", "setpriv") else real_which(name, *args, **more)
def visit(port):
    # Ask the page that is served for its rollouts, and end it as Ctrl-C does.
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/rollouts", timeout=60) as answer:
                found = json.load(answer)
        except OSError:
            time.sleep(0.1)
            continue
        if not found["pending"]:
            print("served", sorted({row["run"] for row in found["rows"]}), found["problems"], flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            return
from backtalk.cli.app import main
for arguments in COMMANDS:
    if "--port" in arguments: threading.Thread(target=visit, args=(arguments[-1],), daemon=True).start()
    sys.argv, code = ["backtalk", *arguments], 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    print("exit", code, flush=True)
    print("#####", flush=True)
"""


SMALL = "steps=1 tasks_per_step=1 group_size=2 evaluation.tasks=0 rollout.max_turns=1 rollout.max_tokens_per_turn=8"
COMMANDS = {
    "doctor": "doctor",
    "import": "import c.jsonl --out o.jsonl",
    "account": "account o.jsonl",
    "triage": "train --preset triage --out no",
    "train": "train --set tasks.source=guess_world:GuessWorld --out r " + " ".join(f"--set {s}" for s in SMALL.split()),
    "show": "show r",
    "report": "report r",
    "export": "view r c.jsonl --export page.html",
    "view": "view r c.jsonl --port PORT",
}


pytestmark = pytest.mark.slow  # trains, where what Linux has is hidden


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command printed, one process for all."""
    folder = tmp_path_factory.mktemp("elsewhere")
    says = [{"role": "user", "content": "List the files."}, {"role": "assistant", "content": "ls"}]
    (folder / "c.jsonl").write_text(json.dumps({"messages": [*says, {"role": "tool", "content": "a.txt"}]}) + "\n")
    shutil.copy(Path(__file__).parents[2] / "examples" / "guess_world.py", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [command.replace("PORT", port).split() for command in COMMANDS.values()]
    program = f"COMMANDS = {commands!r}\n{HIDE}"
    ran = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(ran, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert not (folder / "no").exists()
    return dict(zip(COMMANDS, done.stdout.split("#####\n"), strict=False))


def test_doctor_says_what_works_without_a_sandbox_and_what_needs_linux(said: dict[str, str]) -> None:
    assert "none on Darwin: bubblewrap and Landlock isolate commands on Linux only" in said["doctor"]
    assert (
        "-> What works: import, account, export, score, view, show, report" in said["doctor"]
        and "on Darwin arm64" in said["doctor"]
    )
    assert "Error: a default run cannot work here. Sandbox: none on Darwin" in said["doctor"]
    assert said["doctor"].endswith("exit 1\n") and "Traceback" not in said["doctor"]


def test_training_in_a_terminal_is_refused_in_one_sentence(said: dict[str, str]) -> None:
    (line,) = [line for line in said["triage"].splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: no sandbox on Darwin: bubblewrap and Landlock isolate commands on Linux only")
    assert said["triage"].endswith("exit 2\n") and "Traceback" not in said["triage"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("import", "Written: o.jsonl"),
        ("account", "Tokens, in base"),
        ("train", "finished after 1 step: r"),
        ("show", "training step 0"),
        ("report", "Report: r/report.html"),
        ("export", "Written: page.html"),
        ("view", "served ['c.jsonl', 'r'] []"),
    ],
)
def test_the_rest_works(command: str, words: str, said: dict[str, str]) -> None:
    """Importers, masks, the objective in a training step, and the viewer."""
    assert said[command].endswith("exit 0\n"), said[command]
    assert words in said[command]

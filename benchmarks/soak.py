"""Run thousands of rollouts of random and hostile commands, kill the trainer at random, and check what is left.

    nice -n 5 python benchmarks/soak.py --rollouts 10000 --kills 5

No model: a scripted policy says the commands, everything else is as in a training run (`run_groups`, real sandboxes
in a pool, the run log). Of most attempts the reward is known by construction. A second process is the trainer; it
says "written" when a step's trajectories and metrics are on disk, and is ended by SIGKILL at random moments.
Ends with a table, and exit code 1 where anything leaked, was lost, or got a reward it should not have.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from leftovers import command_lines, mounts, orphans, own_state, parent_of, settled, shared_mib, wait_until_gone

from backtalk.envs.base import Env, Step
from backtalk.envs.terminal import BASH, SUBMIT, TerminalConfig, TerminalEnv, open_terminal_env
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolCall
from backtalk.rollout.groups import EnvFactory, run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import ScriptedSampler
from backtalk.run.log import RunLog
from backtalk.sandboxes import SandboxBackend, SandboxFile, local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, Trajectory

GROUP = 4
LIMITS = RolloutLimits(max_turns=6, rollout_timeout_s=300, concurrency=64)
MODEL = Path(__file__).parent.parent / "src/backtalk/assets/base_model"
NO_REWARD = None
ANSWER = "echo {token} >~/answer"
WRONG = "echo nothing >~/answer"


@dataclass(frozen=True)
class Kind:
    """A kind of policy, and the reward that it must get. `{token}` is what the task asks for."""

    commands: tuple[str, ...]
    reward: float | None
    share: float = 1.0
    patience_s: float = 60.0  # time limit of a command
    hangs: int = 0  # commands that run into it
    test: str = '[ "$(cat ~/answer 2>/dev/null)" = {token} ]; echo $((1 - $?)) >/logs/verifier/reward.txt'
    test_timeout_s: float = 60.0
    setup: str = "true"


KINDS = {
    "solves": Kind(("{random}", "{random}", ANSWER), 1.0, 12),
    "fails": Kind(("{random}", "{random}", WRONG), 0.0, 8),
    "garbage": Kind(("{garbage}", "{garbage}", "{garbage}"), 0.0, 8),
    "says nothing": Kind(("",), 0.0, 2),
    "fork bomb": Kind((ANSWER, "bomb() { while :; do bomb & done; }; bomb & sleep 0.3"), 1.0),
    "fills the disk": Kind((ANSWER, "head -c 500M /dev/zero >fill; cat fill >/tmp/f; ls -la"), 1.0),
    "fills the memory": Kind((ANSWER, "head -c 1G /dev/zero | tail -c 1G | wc -c"), 1.0),
    "many files": Kind((ANSWER, "for ((i = 0; i < 2000; i++)); do : >f$i; done; ls | wc -l"), 1.0),
    "kills everything": Kind(("kill -9 -1", "kill -9 $$", "kill -9 1", ANSWER), 1.0, 2),
    "ends its shell": Kind(("exit 3", "exec true", "set -e; false", ANSWER), 1.0, 2),
    "stops its shell": Kind((ANSWER, "kill -STOP $$"), 1.0, 1, 3.0, 1),
    "hangs": Kind((ANSWER, "trap '' TERM INT HUP; while :; do sleep 1; done"), 1.0, 1, 3.0, 1),
    "floods": Kind((ANSWER, "yes | head -c 9M; head -c 1M /dev/urandom"), 1.0),
    "endless output": Kind((ANSWER, "cat /dev/zero"), 1.0, 0.5, 3.0, 1),
    "leaves daemons": Kind((ANSWER, "setsid sleep 4000 & nohup sleep 4000 & (sleep 4000 &) & disown -a"), 1.0, 2),
    "shuts its folders": Kind((ANSWER, "chmod 000 ~ /tmp /etc /logs /run/shm /; true"), 1.0, 2),
    "removes all": Kind((ANSWER, "rm -rf /logs /tests /tmp /var /opt /srv 2>/dev/null; mkdir -p ~; true"), 1.0),
    "forges": Kind((WRONG, "mkdir -p {v}; echo 1 >{v}/reward.txt; chmod 400 {v}"), 0.0, 2),
    "forges for ever": Kind((WRONG, "mkdir -p {v}; (while :; do echo 1 >{v}/reward.txt; done) 2>/dev/null &"), 0.0, 2),
    "links": Kind((WRONG, "rm -rf /tests /logs; ln -s /proc/1/root /tests; ln -s ~ /logs; ln -s / ~/verifier"), 0.0),
    "shadows programs": Kind(("mkdir ~/bin; echo echo {token} >~/bin/cat; chmod +x ~/bin/*; PATH=~/bin:$PATH",), 0.0),
    "floods reports": Kind((ANSWER, "for fd in /proc/$$/fd/*; do yes >$fd & done 2>/dev/null; sleep 0.2"), 1.0),
    # What has no reward at all, and never a reward of 0.
    "pipe as answer": Kind(("mkfifo ~/answer",), NO_REWARD, 1, test_timeout_s=2.0),
    "silent tests": Kind((ANSWER,), NO_REWARD, 1, test="true"),
    "tests say nan": Kind((ANSWER,), NO_REWARD, 1, test="echo nan >/logs/verifier/reward.txt"),
    "broken setup": Kind((ANSWER,), NO_REWARD, 1, setup="false"),
    "sandbox dies": Kind((ANSWER, "{die}", "echo more"), NO_REWARD, 1),
}
WORDS = "ls -la cat echo /etc/passwd /proc/self/status | && ; > out 2>&1 grep -r root sort head -3 $HOME $(id) * ~ . sh"


def token_of(task_id: str) -> str:
    return hashlib.sha256(task_id.encode()).hexdigest()[:12]


def tasks_of(seed: int, step: int, count: int) -> list[Task]:
    chance = random.Random(f"{seed}/{step}")
    names = chance.choices(list(KINDS), [kind.share for kind in KINDS.values()], k=count)
    return [_task(name, f"{name}/{step}/{index}") for index, name in enumerate(names)]


def _task(name: str, task_id: str) -> Task:
    kind = KINDS[name]
    test = kind.test.format(token=token_of(task_id)).encode()
    return Task(
        id=task_id,
        instruction="Write the token into ~/answer.",
        files={"/home/agent/notes.txt": SandboxFile(b"nothing of use\n", mtime=1_700_000_000)},
        setup=(kind.setup,),
        tests={"test.sh": SandboxFile(test, 0o755)},
        verifier_timeout_s=kind.test_timeout_s,
    )


def kind_of(task_id: str) -> Kind:
    return KINDS[task_id.split("/")[0]]


def replies(key: str, renderer: Renderer) -> list[tuple[int, ...]]:
    """Return the actions of the policy in the rollout of a key, "seed/step/kind/step/index/sample"."""
    chance = random.Random(key)
    task_id = "/".join(key.split("/")[2:5])
    actions = []
    for command in kind_of(task_id).commands:
        command = command.replace("{random}", " ".join(chance.choices(WORDS.split(), k=chance.randint(1, 9))))
        command = command.replace("{garbage}", "".join(map(chr, chance.choices(range(1, 0x250), k=60))))
        command = command.replace("{token}", token_of(task_id)).replace("{v}", "/logs/verifier")
        call = ToolCall("bash", {"command": command})
        actions.append(renderer.encode_action(call) if command else renderer.encode_text("I wonder."))
    return [*actions, renderer.encode_action(ToolCall("submit", {"answer": ""}))]


# The trainer


class Dying:
    """A terminal whose sandbox is killed from outside when the agent sends `{die}`."""

    def __init__(self, env: TerminalEnv) -> None:
        self._env = env
        self.tools, self.reset, self.score = env.tools, env.reset, env.score

    async def step(self, call: ToolCall) -> Step:
        if call.arguments.get("command") == "{die}":
            mark = f"{random.SystemRandom().randrange(10**9)}.125"
            await self._env.step(ToolCall("bash", {"command": f"sleep {mark} &"}))
            for process in [process for process, words in command_lines() if mark in words]:
                while (above := parent_of(process)) and parent_of(above) != os.getpid():
                    process = above  # up to the one that bubblewrap's outer process started
                os.kill(process, signal.SIGKILL)
        return await self._env.step(call)


async def trainer(folder: Path, args: argparse.Namespace) -> None:
    """Write the steps that are missing, and report each on standard output."""
    from transformers import PreTrainedTokenizerFast

    log = RunLog(folder)
    log.truncate_after(log.last_step())
    seed, steps = args.seed, -(-args.rollouts // (args.tasks * GROUP))
    renderer = Renderer(PreTrainedTokenizerFast.from_pretrained(str(MODEL)), (BASH, SUBMIT))
    sampler = ScriptedSampler(lambda key: replies(key, renderer), lambda ids: ids)  # type: ignore[arg-type]
    backend = PooledBackend(local_sandbox())
    for step in range(log.last_step() + 1, steps):
        groups = await run_groups(
            tasks_of(seed, step, args.tasks),
            opener(backend),
            sampler,
            renderer,
            LIMITS,
            group_size=GROUP,
            key=f"{seed}/{step}",
        )
        log.write_groups(step, groups)
        log.write_metrics(step, {"rollouts": sum(map(len, groups))})
        digest = hashlib.sha256(log.groups_path(step).read_bytes()).hexdigest()
        print(json.dumps({"written": step, "digest": digest, **own_state()}), flush=True)
    print(json.dumps({"ended": True, **own_state()}), flush=True)


def opener(backend: SandboxBackend) -> EnvFactory:
    @asynccontextmanager
    async def open_env(task: Task) -> AsyncGenerator[Env]:
        config = TerminalConfig(command_timeout_s=kind_of(task.id).patience_s)
        async with open_terminal_env(task, backend, config) as env:
            yield Dying(env) if task.id.startswith("sandbox dies") else env

    return open_env


# The judge


class Soak:
    """Starts trainers, kills some, and keeps their reports."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.steps = -(-args.rollouts // (args.tasks * GROUP))
        self.chance = random.Random(args.seed)
        self.digests: dict[int, str] = {}
        self.states: list[list[dict[str, float]]] = []  # of each trainer
        self.trainers: list[int] = []
        self.settled_s: list[float] = []
        self.rows: list[tuple[str, str, bool]] = []  # what, found, fine

    def check(self, what: str, found: object, fine: bool) -> None:
        self.rows.append((what, str(found), fine))

    def run(self) -> None:
        before, mounted, shared = orphans(), mounts(), shared_mib()
        kills = sorted(self.chance.sample(range(self.steps - 1), min(self.args.kills, self.steps - 1)))
        for after in [*kills, None]:
            self._one_trainer(after)
            seconds, left, groups = wait_until_gone(self.trainers, before)
            self.settled_s.append(seconds)
            what = "the end" if after is None else f"kill -9 after step {after}"
            self.check(f"processes, control groups left by {what}", f"{left}, {groups}", left == groups == 0)
        self.check("slowest to be clean after a kill, s", f"{max(self.settled_s):.2f}", True)
        now = settled(mounts, mounted)
        self.check("mounts, before and after", f"{mounted}, {now:.0f}", now <= mounted)
        more = settled(shared_mib, shared + 64) - shared
        self.check("memory of files in memory, MiB more", f"{more:.0f}", more <= 64)
        self._check_growth()
        self._check_disk()
        self._check_trajectories()

    def _one_trainer(self, kill_after: int | None) -> None:
        """Run a trainer to its end, or kill it some moments after a step is written."""
        settings = (f"--{name}={getattr(self.args, name)}" for name in ("rollouts", "tasks", "seed"))
        command = [sys.executable, __file__, f"--trainer={self.folder / 'run'}", *settings]
        environment = os.environ | {"TMPDIR": str(self.folder / "tmp")}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert child.stdout is not None
        self.trainers.append(child.pid)
        self.states.append([])
        step_s, last_s = 1.0, time.monotonic()
        for line in child.stdout:
            report = json.loads(line)
            self.states[-1].append(report)
            if "written" not in report:
                continue
            self.digests[report["written"]] = report["digest"]
            step_s, last_s = 0.5 * (step_s + time.monotonic() - last_s), time.monotonic()
            if kill_after is not None and report["written"] >= kill_after:
                time.sleep(self.chance.uniform(0, step_s))
                child.kill()
                for rest in child.stdout:  # what it reported before it died counts
                    with suppress(ValueError):
                        report = json.loads(rest)
                        self.digests[report["written"]] = report["digest"]
        child.stdout.close()
        code = child.wait()
        self.check(f"trainer {len(self.trainers)} ended with", code, code == (0 if kill_after is None else -9))

    def _check_growth(self) -> None:
        whole = [states for states in self.states if len(states) > 4]
        for what, most in (("open files", 0), ("children", 0), ("zombies", 0), ("tasks", 0), ("memory MiB", 64)):
            grown = max((s[-2][what] - s[1][what] for s in whole), default=0)
            self.check(f"{what} of a trainer, most it grew by", f"{grown:.0f}", grown <= most)
        end = self.states[-1][-1]
        self.check("children, zombies, tasks of a trainer at its end", [end["children"], end["zombies"], end["tasks"]],
                   end["zombies"] == 0 and end["children"] == 0 and end["tasks"] == 1)  # fmt: skip

    def _check_disk(self) -> None:
        left = sorted(path.name for path in (self.folder / "tmp").rglob("*"))
        self.check("left in the temporary folder", left[:3], not left)
        strange = [path.name for path in (self.folder / "run").rglob(".*")]
        self.check("half-written files in the run folder", strange[:3], len(strange) <= self.args.kills)

    def _check_trajectories(self) -> None:
        log, lost, kinds = RunLog(self.folder / "run"), [], Counter()
        for step, digest in sorted(self.digests.items()):
            path = log.groups_path(step)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                lost.append(step)
                continue
            groups = log.read_groups(step)
            if sum(map(len, groups)) != self.args.tasks * GROUP:
                lost.append(step)
            kinds.update((t.task_id.split("/")[0], judge(t)) for group in groups for t in group)
        self.check("steps written, of", f"{len(self.digests)}, {self.steps}", len(self.digests) == self.steps)
        self.check("steps lost or changed after they were written", lost[:5], not lost)
        read, wanted = sum(kinds.values()), self.steps * self.args.tasks * GROUP
        self.check("rollouts read back, of", f"{read}, {wanted}", read == wanted)
        for name in KINDS:
            found = {outcome: count for (kind, outcome), count in sorted(kinds.items()) if kind == name}
            self.check(
                f'"{name}", reward {KINDS[name].reward}', found, not any("WRONG" in outcome for outcome in found)
            )


def judge(trajectory: Trajectory) -> str:
    """Compare a trajectory's reward with the one that it must have."""
    kind = kind_of(trajectory.task_id)
    if trajectory.failure is not None and trajectory.reward is not None:
        return "WRONG: a failure with a reward"
    if trajectory.failure is None and trajectory.reward is None:
        return "WRONG: no reward and no failure"
    if trajectory.reward == kind.reward:
        return "as expected"
    if trajectory.reward is None:  # the world broke though nobody asked it to: no reward, which is right
        return f"infrastructure failed at {trajectory.failure.phase}" if trajectory.failure else ""
    late = trajectory.stop_reason is StopReason.DEADLINE or trajectory.stats["command_timeouts"] > kind.hangs
    return "cut by a time limit" if late else f"WRONG: {trajectory.reward}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=16, help="of a step; each has 4 rollouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainer", type=Path, help="be the trainer that writes into this folder")
    args = parser.parse_args()
    if args.trainer is not None:
        asyncio.run(trainer(args.trainer, args))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="backtalk-soak-") as name:
        (Path(name) / "tmp").mkdir()
        soak = Soak(args, Path(name))
        soak.run()
    print("| what | found | |\n| --- | --- | --- |")
    for what, found, fine in soak.rows:
        print(f"| {what} | {found} | {'' if fine else 'NOT FINE'} |")
    seconds = time.monotonic() - began
    rollouts = soak.steps * args.tasks * GROUP
    print(
        f"\n{rollouts} rollouts, {args.kills} kills, seed {args.seed}, {seconds:.0f} s, load {os.getloadavg()[0]:.1f}"
    )
    sys.exit(not all(fine for _, _, fine in soak.rows))


if __name__ == "__main__":
    main()

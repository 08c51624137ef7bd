"""Measure TRL beside Backtalk: a training step with the world-model term, and whole steps with rollouts.

    python benchmarks/engines.py step        # one batch: TRL, ours at 0 and above, two passes; time and memory
    python benchmarks/engines.py rollouts    # rollouts and training: TRL alone, TRL with our rollouts, our engine
    python benchmarks/engines.py rollouts --turns 12 --tasks 2    # the same, long: an answer ends nothing
    python benchmarks/engines.py sampling    # benchmarks/sampling.py: our sampler against generate
    python benchmarks/engines.py             # all of them

Every measurement of the first two is a process of its own, forked from one that has imported everything; it takes a
step to warm up, then measures. Arms take turns, in another order each round. On a machine that is busy anyway,
--together measures the arms of a round at once, so that they meet the same load: compare CPU seconds there. A ratio is
the sum over the rounds by that of the first arm, with a bootstrap interval over the rounds. CPU seconds are those of
the process and of the sandboxes that it has closed. Memory is the peak of the resident set above what it was before the
first step.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sampling
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig
from trl_alone import make_trainer

from backtalk.envs.terminal import TerminalWorld
from backtalk.hosts.trl import EchoGRPOTrainer, WorldRollouts
from backtalk.hosts.trl.conformance import PlainTrainer, cpu_config
from backtalk.hosts.trl.rows import ROLLOUTS, WEIGHTS
from backtalk.language.tokenizer import model_location
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.run.config import TrainConfig, load_config
from backtalk.run.events import StepDone
from backtalk.run.log import RunLog
from backtalk.run.tasks import mixed_tasks_of_step, train_tasks
from backtalk.run.train import train
from backtalk.run.worlds import open_worlds
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole
from objective import memory, ratio_line, small_model

GROUP = 8  # rollouts of a task
TOKENS_OF_TURN = 96  # at most, on average, where the number of turns is given
PROMPT_TOKENS = 64  # about; TRL's limit is of the tokens after the prompt, ours of all
COEFFICIENT = 0.05
PRELOAD = [
    "trl.trainer.grpo_trainer",
    "backtalk.hosts.trl.conformance",
    "backtalk.run.train",
    "backtalk.engines.torch.engine",
]


@dataclass(frozen=True)
class Measured:
    """What one process saw, of the steps after the first; ``tokens`` are all tokens, ``actions`` the policy's own."""

    wall: float
    cpu: float
    mib: int
    rollouts: int = 0
    tokens: int = 0
    actions: int = 0


class Clock:
    """Wall-clock and CPU seconds, of this process and of the children that it has waited for, at each ``tick``."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self.rest = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def tick(self) -> None:
        self.ticks.append((time.perf_counter(), sum(os.times()[:4])))

    def read(self, **counts: int) -> Measured:
        (wall, cpu), (last_wall, last_cpu) = self.ticks[0], self.ticks[-1]
        return Measured(last_wall - wall, last_cpu - cpu, memory("VmHWM") - self.rest, **counts)


class Ticker(TrainerCallback):
    """Ticks at the end of each step of TRL's loop."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


def quiet(threads: int) -> None:
    """Set the threads of a measuring process, and keep the libraries' notices out of the table."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()


def measure(trainer: Any) -> Clock:
    """Train, and return the clock, whose first tick is the end of the step that warms up."""
    trainer.remove_callback(PrinterCallback)
    ticker = Ticker()
    trainer.add_callback(ticker)
    trainer.train()
    return ticker.clock


def grpo_config(folder: str, steps: int, rows: int, **changes: Any) -> GRPOConfig:
    """Return TRL's settings for steps of ``rows`` rollouts, with the loss of Backtalk's defaults."""
    settings: dict[str, Any] = dict(max_steps=1 + steps, learning_rate=1e-7, loss_type="grpo", shuffle_dataset=False)
    settings |= dict(per_device_train_batch_size=rows, num_generations=min(GROUP, rows))
    return cpu_config(folder, **settings | changes)


# One training step on a recorded batch.


class TwoPasses(PlainTrainer):
    """TRL's GRPO, and the world-model term from a forward and backward pass of its own."""

    def _generate_and_score_completions(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return EchoGRPOTrainer._own_rollouts(self, inputs)  # type: ignore[arg-type]

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logprobs = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]
        world = -(logprobs * inputs[WEIGHTS]).sum() / inputs[ROLLOUTS].sum()
        self.accelerator.backward(COEFFICIENT * world)  # its graph is gone before the next is made
        return super()._compute_loss(model, inputs, *args, **kwargs)


def train_on_batch(arm: str, model: str, samples: Path, steps: int, threads: int) -> Measured:
    """Take steps on one recorded batch with TRL's loop; ``arm`` is one of STEP_ARMS."""
    quiet(threads)
    rows: list[Sample] = pickle.loads(samples.read_bytes())
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "train_dataset": Dataset.from_list([{"prompt": "recorded"}] * len(rows)),
        "processing_class": AutoTokenizer.from_pretrained(model),
    }
    with tempfile.TemporaryDirectory() as folder:
        common["args"] = grpo_config(folder, steps, len(rows))
        if arm in ("TRL", "two passes"):
            trainer: Any = (PlainTrainer if arm == "TRL" else TwoPasses)(reward_funcs=no_reward, **common)
            trainer.objective, trainer.rollouts = ObjectiveConfig(), lambda inputs, trainer: rows
        else:
            trainer = EchoGRPOTrainer(rollouts=lambda inputs, trainer: rows, world_model_coeff=STEP_ARMS[arm], **common)
        return measure(trainer).read()


def no_reward(completions: Sequence[Any], **kwargs: Any) -> list[None]:
    return [None] * len(completions)


STEP_ARMS = {"TRL": 0.0, "ours, coefficient 0": 0.0, "ours, coefficient 0.05": COEFFICIENT, "two passes": COEFFICIENT}


def record(folder: Path) -> list[Sample]:
    """Run the rollouts of one step of the preset with the base model and return them as samples."""
    config = load_config("triage", {"steps": 1, "evaluation.tasks": 0})
    log = RunLog(asyncio.run(train(config, folder)))
    return [sample for group in log.read_groups(0) for sample in build_samples(group, config.objective)]


def step(args: argparse.Namespace, folder: Path) -> None:
    """Print time and memory of a training step with each arm, for two models."""
    recorded = fresh(record, folder / "recorded")
    step_of("the embedded base model", model_location("base"), recorded[::2], args, folder)
    step_of("Qwen3-0.6B in small", small_model(folder / "small"), recorded[::16], args, folder)


def step_of(title: str, model: str, samples: Sequence[Sample], args: argparse.Namespace, folder: Path) -> None:
    roles, longest = torch.cat([sample.roles for sample in samples]), max(map(len, samples))
    actions, observed = (float((roles == role).float().mean()) for role in (TokenRole.ACTION, TokenRole.ENV_OUTPUT))
    print(
        f"\nstep: {title}, {len(samples)} recorded rollouts, {len(roles)} tokens ({actions:.0%} actions, "
        f"{observed:.0%} environment output), padded by TRL to {len(samples) * longest}"
    )
    batch = folder / "batch"
    batch.write_bytes(pickle.dumps(list(samples)))
    arms: Arms = {arm: partial(train_on_batch, arm, model, batch, args.steps, args.threads) for arm in STEP_ARMS}
    print_ratios(in_turns(arms, args), args.steps)


# Whole steps: rollouts and training.


def step_tasks(config: TrainConfig, steps: int) -> list[Task]:
    """Return the tasks of the first steps of a run, in order."""

    async def load() -> list[Task]:
        async with open_worlds(config) as worlds:
            pools, per_step, seed = train_tasks(config, worlds), config.tasks_per_step, config.seed
            return [task for i in range(steps) for task in mixed_tasks_of_step(pools, per_step, seed, i)]

    return asyncio.run(load())


def rollout_settings(tasks: int, turns: int | None) -> dict[str, Any]:
    """Return settings of the preset for steps of so many tasks, whose rollouts have so many turns if they are given."""
    settings: dict[str, Any] = {"tasks_per_step": tasks, "group_size": GROUP}
    if turns is not None:
        settings |= {"rollout.max_turns": turns, "rollout.max_tokens": max(1024, TOKENS_OF_TURN * turns)}
        settings |= {"terminal.tools": ["bash"], "terminal.system_prompt": "You work in a Linux shell. Run commands."}
    return settings


def train_with_trl(settings: dict[str, Any], steps: int, threads: int, *, our_rollouts: bool) -> Measured:
    """Train with TRL's loop on its own rollouts, or on ours and with the world-model term."""
    quiet(threads)
    config = load_config("triage", settings)
    rows = config.tasks_per_step * GROUP
    tasks, limits = step_tasks(config, 1 + steps), config.rollout
    counts: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        args = grpo_config(
            folder,
            steps,
            rows,
            max_completion_length=limits.max_tokens - PROMPT_TOKENS,
            max_tool_calling_iterations=limits.max_turns - 1,
            generation_kwargs={"max_new_tokens": limits.max_tokens_per_turn},
        )
        if our_rollouts:
            clock = measure(echo_trainer(config, tasks, args, counts))
        else:
            clock = measure(make_trainer(tasks, config.terminal, args, counts))
    tokens, actions = (sum(column[1:]) for column in zip(*counts, strict=True))
    return clock.read(rollouts=rows * steps, tokens=tokens, actions=actions)


def echo_trainer(
    config: TrainConfig, tasks: Sequence[Task], args: GRPOConfig, counts: list[tuple[int, int]]
) -> EchoGRPOTrainer:
    """Return TRL's trainer on our rollouts; it appends the number of tokens of each step to ``counts``."""
    world = TerminalWorld(PooledBackend(local_sandbox()), config.terminal)
    rollouts = WorldRollouts(world, tasks, limits=config.rollout)

    def counted(inputs: Any, trainer: Any) -> list[Sample]:
        samples = rollouts(inputs, trainer)
        counts.append((sum(map(len, samples)), sum(int(sample.sampled.sum()) for sample in samples)))
        return samples

    return EchoGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_location("base"), dtype=torch.float32),
        args=args,
        train_dataset=rollouts.dataset,
        processing_class=AutoTokenizer.from_pretrained(model_location("base")),
        rollouts=counted,
        world_model_coeff=COEFFICIENT,
    )


def train_with_ours(settings: dict[str, Any], steps: int, threads: int) -> Measured:
    """Train with Backtalk's own engine and loop, world-model term, run folder and metrics included."""
    quiet(threads)
    overrides = settings | {"steps": 1 + steps, "evaluation.tasks": 0, "engine.learning_rate": 1e-7}
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()

        def on_event(event: Any) -> None:
            if isinstance(event, StepDone):
                clock.tick()

        log = RunLog(asyncio.run(train(load_config("triage", overrides), Path(folder) / "run", on_event=on_event)))
        done = [trajectory for i in range(1, 1 + steps) for group in log.read_groups(i) for trajectory in group]
    tokens, actions = sum(map(len, done)), sum(trajectory.count(TokenRole.ACTION) for trajectory in done)
    return clock.read(rollouts=len(done), tokens=tokens, actions=actions)


def rollouts(args: argparse.Namespace) -> None:
    """Print rollouts and tokens a second of whole training steps, and their memory."""
    turns = "" if args.turns is None else f", {args.turns} turns: an answer ends nothing"
    print(f"\nrollouts: preset triage, embedded base model, {args.tasks} tasks of {GROUP} rollouts a step{turns}")
    settings = rollout_settings(args.tasks, args.turns)
    arms: Arms = {
        "TRL alone": partial(train_with_trl, settings, args.steps, args.threads, our_rollouts=False),
        "TRL, our rollouts": partial(train_with_trl, settings, args.steps, args.threads, our_rollouts=True),
        "our engine": partial(train_with_ours, settings, args.steps, args.threads),
    }
    found = in_turns(arms, args)
    print(
        f"{'':24}{'rollouts':>9} {'tokens':>8} {'actions':>8} {'rollouts/s':>11} {'tokens/s':>9}  (of wall-clock time)"
    )
    for arm, rows in found.items():
        wall = sum(row.wall for row in rows)
        count, tokens, actions = (sum(getattr(row, key) for row in rows) for key in ("rollouts", "tokens", "actions"))
        print(f"{arm:24}{count:9} {tokens:8} {actions:8} {count / wall:11.2f} {tokens / wall:9.0f}")
    print_ratios(found, args.steps)


# What both share.

Arms = dict[str, Callable[[], Measured]]


def in_turns(arms: Arms, args: argparse.Namespace) -> dict[str, list[Measured]]:
    """Measure every arm once a round, each in a process of its own, in an order that turns by one each round."""
    found: dict[str, list[Measured]] = {arm: [] for arm in arms}
    names = list(arms)
    with ThreadPoolExecutor(len(names) if args.together else 1) as threads:
        for number in range(args.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for arm, measured in zip(order, threads.map(lambda arm: fresh(arms[arm]), order), strict=True):
                found[arm].append(measured)
                print(f"[round {number}, load {os.getloadavg()[0]:.0f}] {arm}: {measured}", file=sys.stderr, flush=True)
    return found


def print_ratios(found: dict[str, list[Measured]], steps: int) -> None:
    """Print each arm's seconds a step and memory, and their ratios to the first arm's."""
    base = next(iter(found.values()))
    print(f"\n{'':24}" + "".join(f"{name:>10} {'ratio [95 %]':>22}" for name in ("wall s", "cpu s", "MiB")))
    for arm, rows in found.items():
        line = f"{arm:24}"
        for key, scale, form in (("wall", steps, ".2f"), ("cpu", steps, ".2f"), ("mib", 1, ".0f")):
            pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(rows, base, strict=True)]
            line += f"{statistics.mean(a for a, _ in pairs) / scale:10{form}} {ratio_line(pairs):>22}"
        print(line, flush=True)


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which begins with everything imported."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["step", "rollouts", "sampling"], help="all of them by default")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="measured in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=8, help="of a step of rollouts")
    parser.add_argument("--turns", type=int, help="of each rollout, which then goes on after an answer")
    parser.add_argument(
        "--together", action="store_true", help="the arms of a round at once, on a machine that is busy"
    )
    args = parser.parse_args()
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{os.cpu_count()} cores, {args.threads} threads, load before {load}; trl {trl.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    if args.part in (None, "step"):
        with tempfile.TemporaryDirectory() as folder:
            step(args, Path(folder))
    if args.part in (None, "rollouts"):
        rollouts(args)
    if args.part in (None, "sampling"):
        print()
        sampling.main(["--threads", str(args.threads)])


if __name__ == "__main__":
    main()

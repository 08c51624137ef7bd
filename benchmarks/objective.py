"""Time and memory of a train step: its head, packing, a world-model coefficient above 0, and measured gradients.

    python benchmarks/objective.py head      # memory and time of hidden states -> log-probabilities and back
    python benchmarks/objective.py packing   # several samples in a row against padding
    python benchmarks/objective.py lambda    # a whole step at world_model_coeff 0.05 against 0
    python benchmarks/objective.py norms     # a step that measures both terms' gradients against one that does not

`head` runs each method in a process of its own, one at a time, in alternation. Memory is the peak of the resident set
above that of the inputs, gradients included. The others run pairs of steps in alternation and print a bootstrap
interval of the ratio, `norms` of CPU seconds. CPU seconds are those of the whole process. Wall-clock seconds need an
idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.gradients import MEASURE_EVERY, MEASURE_EVERY_UNDER_SHARE
from backtalk.engines.torch.head import head_logprobs
from backtalk.objective.coefficient import Share
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.run.log import RunLog
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

MIB = 2**20


class Problem:
    """Random states, head and upstream gradient; ``rows`` are the tokens that carry weight."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        count = args.batch * (args.length - 1)
        with device or torch.device("cpu"):
            self.states = torch.randn(count, args.width).to(dtype).requires_grad_()
            self.weight = (torch.randn(args.vocab, args.width) / args.width**0.5).to(dtype).requires_grad_()
            self.ids = torch.randint(args.vocab, (count,))
            self.rows = torch.rand(count) < args.selected
            self.upstream = -torch.rand(count)[self.rows] / count
            self.is_action = torch.rand(len(self.upstream)) < 0.25  # their gradient depends on the result

    def selected(self) -> tuple[Tensor, Tensor]:
        return self.states[self.rows], self.ids[self.rows]


def naive(p: Problem) -> Tensor:
    """Compute all logits at once, as a model does, and select from their log-softmax."""
    logprobs_NV = torch.log_softmax((p.states @ p.weight.T).float(), -1)
    return logprobs_NV.gather(-1, p.ids[:, None])[:, 0][p.rows]


def ours(p: Problem, *, hint: bool = False, tempered: bool = False) -> Tensor:
    states, ids = p.selected()
    temperature = torch.where(p.is_action, 0.7, 1.0) if tempered else torch.ones(len(ids))
    grad_hint = p.upstream.masked_fill(p.is_action, 0) if hint else None
    return head_logprobs(states, p.weight, None, ids, temperature, grad_hint)


def checkpointed(p: Problem) -> Tensor:
    def chunk(states: Tensor, ids: Tensor) -> Tensor:
        return -torch.nn.functional.cross_entropy(states @ p.weight.T, ids, reduction="none")

    states, ids = p.selected()
    size = max(2**26 // len(p.weight), 1)
    pairs = zip(states.split(size), ids.split(size), strict=True)
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs])  # type: ignore[arg-type]


def trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # Off Triton, TRL scores every position and masks afterwards (add_fused_lm_head).
    logprobs = ChunkedLogProbFunction.apply(
        p.states, p.weight, None, p.ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    return logprobs[0][p.rows]


def liger_torch(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import fused_linear_ppo as liger

    states, ids = p.selected()
    size = liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return liger._ChunkedSelectiveLogProbFunction.apply(states, p.weight, ids, None, 1.0, size)  # type: ignore[return-value]


def liger_triton(p: Problem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    states, ids = p.selected()
    return -liger_fused_linear_cross_entropy(states, p.weight, ids, reduction="none")


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "logits + log_softmax": naive,
    "backtalk, no hint": ours,
    "backtalk, hint for 3 of 4": partial(ours, hint=True),
    "backtalk, per-token temperature": partial(ours, hint=True, tempered=True),
    "backtalk, frozen head": ours,
    "checkpointed chunks": checkpointed,
    "TRL fused head": trl,
    "Liger, torch": liger_torch,
    "Liger, Triton": liger_triton,
}
BASE = "logits + log_softmax"


def memory(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 // MIB for line in lines if line.startswith(key))


def measure_method(args: argparse.Namespace) -> None:
    """Print seconds and peak MiB of a method's forward and backward passes as JSON; save results to ``--save``."""
    problem = Problem(args)
    problem.weight.requires_grad_(args.one != "backtalk, frozen head")
    free = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "Available" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (free * 1024, free * 1024))  # fail here rather than take others down
    seconds, cpu, before = [], [], memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    try:
        for _ in range(args.repeats):
            problem.states.grad = problem.weight.grad = None
            gc.collect()
            started, began = time.perf_counter(), time.process_time()
            logprobs = METHODS[args.one](problem)
            logprobs.backward(problem.upstream)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - began)
    except Exception as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        print(json.dumps({"error": f"{type(error).__name__}: {last[:120]}"}))
        return
    found = {"seconds": min(seconds), "cpu": min(cpu), "mib": memory("VmHWM") - before}
    print(json.dumps(found))
    if args.save:
        torch.save([logprobs.detach(), problem.states.grad, problem.weight.grad], args.save)


def describe_errors(found: Path, expected: Path) -> str:
    """Return the largest difference of values in nats, and the relative error of gradients in their norms."""
    pairs = list(zip(torch.load(found), torch.load(expected), strict=True))
    value = (pairs[0][0] - pairs[0][1]).abs().max().item()
    relative = [((a - b).norm() / b.norm()).item() for a, b in pairs[1:] if a is not None]
    return f"{value:9.1e} {max(relative):9.1e}"


def head(args: argparse.Namespace) -> None:
    sizes = f"B={args.batch}, T={args.length}, d={args.width}, V={args.vocab:,}, float32"
    for selected in args.shares:
        print(
            f"\nhead: {sizes}, {selected:.0%} of the tokens carry weight, {args.threads} threads, "
            f"torch {torch.__version__}"
        )
        columns = "".join(f"{key:>8} {'ratio':>6} " for key in ("seconds", "cpu s"))
        print(f"{'':34}{columns}{'MiB':>7} {'ratio':>6} {'d value':>9} {'d grad':>9}")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
        with tempfile.TemporaryDirectory() as folder:
            saved = {name: Path(folder, f"{i}.pt") for i, name in enumerate(METHODS)}
            for round_number in range(args.rounds):
                for name in METHODS:
                    save = saved[name] if round_number == 0 else ""
                    own = ["--one", name, "--selected", str(selected), "--save", str(save)]
                    command = [sys.executable, __file__, *sys.argv[1:], *own]
                    run = subprocess.run(command, capture_output=True, text=True)
                    killed = json.dumps({"error": f"ended with {run.returncode}, out of memory?"})
                    found[name].append(json.loads(run.stdout.splitlines()[-1] if run.stdout else killed))
            base = found[BASE]
            for name, results in found.items():
                if "error" in results[0]:
                    print(f"{name:34}does not run here: {results[0]['error']}")
                    continue
                numbers = ""
                for key, form in (("seconds", "8.2f"), ("cpu", "8.2f"), ("mib", "7.0f")):
                    value = statistics.median(r[key] for r in results)
                    ratio = statistics.median(r[key] / b[key] for r, b in zip(results, base, strict=True))
                    numbers += f"{value:{form}} {ratio:6.2f} "
                skip = "temperature" in name
                errors = "" if skip else describe_errors(saved[name], saved[BASE])
                print(f"{name:34}{numbers}{errors}")


def rollouts(count: int, vocab: int, seed: int) -> list[Sample]:
    """Make terminal rollouts of very uneven length: a prompt, 1 to 16 turns, observations with a long tail."""
    noise = random.Random(seed)

    def ids(n: float) -> tuple[int, ...]:
        return tuple(noise.randrange(3, vocab) for _ in range(max(1, int(n))))

    def trajectory(index: int) -> Trajectory:
        segments = [Segment(TokenRole.CONTEXT, ids(150))]
        for turn in range(noise.choice((1, 2, 2, 3, 3, 4, 5, 6, 8, 12, 16))):
            action = ids(noise.uniform(10, 50))
            logprobs = tuple(-7.3 - noise.random() / 10 for _ in action)
            segments += [
                Segment(TokenRole.ACTION, action, logprobs, turn=turn, tool="bash"),
                Segment(TokenRole.TEMPLATE, ids(6), turn=turn),
                Segment(TokenRole.ENV_OUTPUT, ids(min(noise.lognormvariate(3.3, 1.0), 400)), turn=turn, tool="bash"),
                Segment(TokenRole.TEMPLATE, ids(6), turn=turn),
            ]
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=float(index % 2))

    return build_samples(TrajectoryGroup("t", tuple(trajectory(i) for i in range(count))), ObjectiveConfig())


def small_model(folder: Path) -> str:
    """Save a small Qwen3-0.6B with its ratio of head to body weights (1 to 2.8) and the embedded tokenizer, filled."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=25_000, hidden_size=256, intermediate_size=768, num_hidden_layers=21)
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    tokenizer = TorchEngine(TorchConfig(device="cpu")).tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), sizes["vocab_size"])])
    tokenizer.save_pretrained(folder)
    return str(folder)


def engine_of(model: str, **settings: Any) -> TorchEngine:
    return TorchEngine(TorchConfig(model=model, learning_rate=1e-7, dtype="float32", device="cpu", **settings))


def step_seconds(engine: TorchEngine, samples: list[Sample], config: ObjectiveConfig) -> float:
    started = time.perf_counter()
    asyncio.run(engine.train_step(samples, config))
    return time.perf_counter() - started


def ratio_interval(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return sum / sum over pairs, with a percentile bootstrap over the pairs."""
    noise = random.Random(0)

    def ratio(some: list[tuple[float, float]]) -> float:
        return sum(a for a, _ in some) / sum(b for _, b in some)

    drawn = sorted(ratio(noise.choices(pairs, k=len(pairs))) for _ in range(2000))
    return ratio(pairs), drawn[50], drawn[1949]


def ratio_line(pairs: list[tuple[float, float]]) -> str:
    ratio, low, high = ratio_interval(pairs)
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def alternating(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Run both in alternation and return pairs of seconds."""
    first(), second()  # warm up
    seconds = []
    for number in range(pairs):
        if number % 2:
            b = second()
            seconds.append((first(), b))
        else:
            seconds.append((first(), second()))
    return seconds


def packing(args: argparse.Namespace, folder: Path) -> None:
    print(
        f"\npacking: seconds of a step, packed / padded (95 % interval), {args.threads} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'':34}{'samples':>8} {'tokens':>8} {'padded':>8} {'packed':>8} {'packed / padded':>24}")
    config = ObjectiveConfig()
    for name, model, count in (("embedded model", "base", 64), ("Qwen3-0.6B in small", small_model(folder), 16)):
        for budget in (8192, 32768):
            engines = [engine_of(model, packing=how, max_tokens_per_microbatch=budget) for how in ("on", "off")]
            samples = rollouts(count, len(engines[0].tokenizer), 1)
            forwarded = [
                sum(len(part) * max(sum(map(len, row)) for row in part) for part in engine._micro_batches(samples))
                for engine in engines
            ]
            runs = [partial(step_seconds, engine, samples, config) for engine in engines]
            pairs = alternating(runs[0], runs[1], args.pairs)
            tokens = sum(map(len, samples))
            title = f"{name}, {budget} a micro-batch"
            print(f"{title:34}{count:8} {tokens:8} {forwarded[1]:8} {forwarded[0]:8} {ratio_line(pairs):>24}")


def coefficient(args: argparse.Namespace, folder: Path) -> None:
    print(f"\nlambda: seconds of a step at world_model_coeff 0.05 / 0 (95 % interval), {args.threads} threads")
    on, off = ObjectiveConfig(world_model_coeff=0.05), ObjectiveConfig(world_model_coeff=0.0)
    for name, model, count in (("embedded model", "base", 64), ("Qwen3-0.6B in small", small_model(folder), 8)):
        engine = engine_of(model)
        samples = rollouts(count, len(engine.tokenizer), 2)
        tokens = sum(map(len, samples))
        actions, targets = (
            sum(int((s.roles == r).sum()) for s in samples) for r in (TokenRole.ACTION, TokenRole.ENV_OUTPUT)
        )
        runs = [partial(step_seconds, engine, samples, config) for config in (on, off)]
        pairs = alternating(runs[0], runs[1], args.pairs)
        mean = statistics.mean(b for _, b in pairs)
        print(
            f"{name:24}{count:4} samples, {tokens} tokens ({actions / tokens:.0%} action, {targets / tokens:.0%} "
            f"target), {mean:.2f} s: {ratio_line(pairs)}"
        )


def norms(args: argparse.Namespace) -> None:
    """Measure the CPU seconds of a step with measured gradients, and what that is of the updates and steps of a run."""
    print(f"\nnorms: CPU seconds of a step, gradients measured / not (95 % interval), {args.threads} threads")

    def cpu_seconds(engine: TorchEngine, samples: list[Sample], config: ObjectiveConfig) -> float:
        started = time.process_time()
        asyncio.run(engine.train_step(samples, config))
        return time.process_time() - started

    number, share = ObjectiveConfig(world_model_coeff=0.05), ObjectiveConfig(world_model_coeff=Share(0.2))
    for name, measured, every in (("a number", number, MEASURE_EVERY), ("a share", share, MEASURE_EVERY_UNDER_SHARE)):
        engines = [engine_of("base", measure_gradients_every=n) for n in (1, 0)]
        samples = rollouts(args.samples, len(engines[0].tokenizer), 2)
        runs = [partial(cpu_seconds, e, samples, c) for e, c in zip(engines, (measured, number), strict=True)]
        pairs = alternating(runs[0], runs[1], args.pairs)
        added = (sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1) / every
        print(f"{name:<9}{ratio_line(pairs)}; one in {every}: {added:.1%} of updates")
        if args.run:
            rows = RunLog(args.run).read_metrics()
            update = sum(row["train_seconds"] for row in rows)
            part = update / (update + sum(row["rollout_seconds"] for row in rows))
            print(f"    updates are {part:.0%} of {args.run}'s steps, so that is {added * part:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["head", "packing", "lambda", "norms"])
    for name, default in {
        "batch": 4,
        "length": 2048,
        "width": 512,
        "vocab": 151_936,
        "threads": 2,
        "rounds": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=2, help="passes in each process of `head`; the best counts")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps of `packing`, `lambda` and `norms`")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5], help="of tokens that carry weight")
    parser.add_argument("--samples", type=int, default=64, help="rollouts of a step of `norms`")
    parser.add_argument("--run", help="run folder, for `norms`: how much of a run updates take")
    for name in ("one", "save", "selected"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        args.selected = float(args.selected)
        measure_method(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        for what in args.what:
            if what == "head":
                head(args)
            elif what == "packing":
                packing(args, Path(folder, "model"))
            elif what == "norms":
                norms(args)
            else:
                coefficient(args, Path(folder, "model"))


if __name__ == "__main__":
    main()

"""Make the embedded base model: record explorers, train a tokenizer, train a small transformer.

    python recipes/base_model/build.py          # about 40 minutes on 2 cores

It is trained on ordinary shell sessions in home folders and on rollouts of triage tasks of the train split, on every
token of both: commands and their output. A last part leaves most wrong rollouts out and learns above all what explorers
type. So the model knows both halves of a conversation with a machine and solves a third of the tasks; the rest is left
to reinforcement learning. With ``--world-weight 0 --last-world-weight 0`` it learns of triage the explorers' tokens
alone, and what a triage machine outputs stays strange to it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from operator import itemgetter
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from backtalk.envs.terminal import BASH, SUBMIT, TerminalConfig
from backtalk.language.renderer import Renderer
from backtalk.run.log import write_trajectories
from backtalk.tasks.task import Split
from backtalk.tasks.triage import triage_task
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory
from muon import Muon
from record import read, record, unpack, unpack_call
from sessions import Session, ordinary_session, triage_session
from tokenizer import train_tokenizer

log = logging.getLogger("build")
ASSETS = Path(__file__).parents[2] / "src/backtalk/assets"
FIRST_SEED = 50_000_000  # far from the seeds that training draws


@dataclass(frozen=True, kw_only=True)
class Recipe:
    ordinary_sessions: int = 6000
    triage_sessions: int = 6000
    held_out_sessions: int = 200
    skill: float = 0.3
    failures_kept: float = 0.2  # of the explorers' wrong rollouts, in the last part
    world_weight: float = 0.3  # of a token that no explorer wrote, in triage; an explorer's token weighs 1
    last_world_weight: float = 0.05  # the same in the last part, in ordinary sessions too
    vocab_size: int = 1536
    hidden_size: int = 128
    layers: int = 4
    drill_steps: int = 350
    steps: int = 800
    last_steps: int = 350
    learning_rate: float = 3e-3
    batch_tokens: int = 4_000
    seed: int = 0


def triage_seeds(split: Split, level: int, first: int) -> Iterator[int]:
    seed = first
    while True:
        if triage_task(seed, level).split is split:
            yield seed
        seed += 1


def explorer_sessions(count: int, skill: float, split: Split, first: int) -> Iterator[Session]:
    """Make sessions of triage tasks at levels 1 and 2, with a few of 3 and 4."""
    seeds = {level: triage_seeds(split, level, first) for level in (1, 2, 3, 4)}
    for i in range(count):
        level = (1, 2, 1, 2, 1, 2, 1, 2, 3, 4)[i % 10]
        yield triage_session(next(seeds[level]), level, skill)


def to_trajectory(session: dict, renderer: Renderer) -> Trajectory:
    """Encode a recorded session in the tokens of the model; the explorer's tokens are unsampled actions."""
    segments = list(renderer.render_prompt([unpack(message) for message in session["prompt"]]))
    for number, turn in enumerate(session["turns"]):
        call = unpack_call(turn["call"])
        ids = renderer.encode_action(call)
        segments.append(Segment(TokenRole.ACTION, ids, turn=number))
        if turn["messages"]:
            messages = [unpack(message) for message in turn["messages"]]
            segments += renderer.render_observation(messages, turn=number, closed=True)
    return Trajectory(task_id=session["id"], sample_index=0, segments=tuple(segments), stop_reason=StopReason.SUBMITTED)


def texts(session: dict) -> Iterator[str]:
    for message in session["prompt"]:
        yield from (text for text, _ in message["parts"])
    for turn in session["turns"]:
        yield turn["call"][1]
        for message in turn["messages"]:
            yield from (text for text, _ in message["parts"])


def examples(sessions: list[dict], renderer: Renderer, world_weight: float) -> list[tuple[Tensor, Tensor]]:
    """Return (token ids [T], weights [T]) of each session."""
    pairs = []
    for session in sessions:
        trajectory = to_trajectory(session, renderer)
        is_action = torch.tensor([role == TokenRole.ACTION for role in trajectory.roles])
        weights = torch.where(is_action, 1.0, world_weight)
        pairs.append((torch.tensor(trajectory.token_ids), weights))
    return pairs


def batches(pairs: list[tuple[Tensor, Tensor]], tokens: int, random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield [B, T] batches of like length, in endless epochs."""
    while True:
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + random.randint(-20, 20))
        starts, size = [], 0
        for position, i in enumerate(order):
            if not starts or size + len(pairs[i][0]) > tokens:
                starts.append(position)
                size = 0
            size += len(pairs[i][0])
        slices = [order[a:b] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
        random.shuffle(slices)
        for chosen in slices:
            ids = torch.nn.utils.rnn.pad_sequence([pairs[i][0] for i in chosen], batch_first=True)
            weights = torch.nn.utils.rnn.pad_sequence([pairs[i][1] for i in chosen], batch_first=True)
            yield ids, weights


def drill_batches(vocab_size: int, tokens: int, random: Random, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of repeated random tokens, learned from the second time on. They teach copying in minutes.

    Short periods come first: with few places to attend to, the loss falls from the start.
    """
    length = 48
    for step in itertools.count(first):
        period = random.randint(2, min(24, 3 + step // 20))
        once = torch.randint(0, vocab_size, (tokens // length, period))
        ids = once.repeat(1, length // period + 1)[:, :length]
        yield ids, (torch.arange(length) >= period).float().expand_as(ids)


def mixed(*parts: tuple[int, Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield so many batches of each part in turn, for ever."""
    while True:
        for count, part in parts:
            yield from itertools.islice(part, count)


def train(
    model: LlamaForCausalLM, data: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float, *, cool: bool
) -> None:
    """Train with Muon for the matrices and AdamW for the rest. With ``cool`` the rate falls to 0 over the last part."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    seen = 0
    for step, (ids, weights) in enumerate(itertools.islice(data, steps)):
        done = step / steps
        for optimizer, full in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * min((step + 1) / 20, 1.0, (1 - done) / 0.6 if cool else 1.0)
        learned = weights[:, 1:] > 0
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, :-1][learned])
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned], reduction="none")
        loss = (losses * weights[:, 1:][learned]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        if step % 50 == 0:
            log.info("step %d  %.0f%%  loss %.3f  %.2f M tokens", step, 100 * done, loss.item(), seen / 1e6)


def new_model(recipe: Recipe, vocab_size: int, work: Path) -> LlamaForCausalLM:
    """Return a small Llama that has been drilled in copying; it is kept in ``work`` between runs."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.hidden_size * 5 // 2,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden_size // 32,
            num_key_value_heads=recipe.hidden_size // 32,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    log.info("%.2f M parameters, %d tokens in the vocabulary", model.num_parameters() / 1e6, vocab_size)
    drilled = work / f"drilled_{vocab_size}_{recipe.hidden_size}_{recipe.layers}.pt"
    if drilled.exists():
        model.load_state_dict(torch.load(drilled))
    else:
        data = drill_batches(vocab_size, recipe.batch_tokens, Random(recipe.seed))
        train(model, data, recipe.drill_steps, recipe.learning_rate, cool=False)
        torch.save(model.state_dict(), drilled)
    return model


def learn(model: LlamaForCausalLM, recipe: Recipe, pairs: dict[str, list[tuple[Tensor, Tensor]]], work: Path) -> None:
    """Train on all sessions. The weights are rounded to bfloat16 and kept in ``work`` between runs."""
    learned = work / f"learned_{recipe.hidden_size}_{recipe.layers}_{recipe.world_weight:g}_{recipe.steps}.pt"
    if not learned.exists():
        drill = drill_batches(model.config.vocab_size, recipe.batch_tokens, Random(recipe.seed), first=400)
        data = mixed(
            (2, batches(pairs["triage"], recipe.batch_tokens, Random(recipe.seed))),
            (1, batches(pairs["ordinary"], recipe.batch_tokens, Random(recipe.seed))),
            (1, drill),  # so that copying is not forgotten
        )
        train(model, data, recipe.steps, recipe.learning_rate, cool=True)
        torch.save({name: weight.bfloat16() for name, weight in model.state_dict().items()}, learned)
    model.load_state_dict(torch.load(learned))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


async def record_all(recipe: Recipe, work: Path) -> None:
    ordinary = (ordinary_session(recipe.seed * 1_000_000 + i) for i in range(recipe.ordinary_sessions))
    triage = explorer_sessions(recipe.triage_sessions, recipe.skill, Split.TRAIN, FIRST_SEED)
    # Other seeds, other split, a better explorer: another policy than any that is trained here.
    held_out = explorer_sessions(recipe.held_out_sessions, 0.7, Split.HELD_OUT, 2 * FIRST_SEED)
    config = TerminalConfig()
    for name, sessions in (("ordinary", ordinary), ("triage", triage), ("held_out", held_out)):
        path = work / f"{name}.jsonl"
        if not path.exists():
            began = time.monotonic()
            count = await record(sessions, path.with_suffix(".part"), config)
            path.with_suffix(".part").rename(path)
            log.info("recorded %d %s sessions in %.0f s", count, name, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("base_model_work"), help="recordings are kept here")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where base_model/ and recorded/ are written")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    work, out = arguments.pop("work"), arguments.pop("out")
    recipe = Recipe(**arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work.mkdir(parents=True, exist_ok=True)
    asyncio.run(record_all(recipe, work))

    # Sessions were written as they ended; sorted, they are in the same order every time.
    ordinary, triage = (sorted(read(work / f"{name}.jsonl"), key=itemgetter("id")) for name in ("ordinary", "triage"))
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer((text for s in (*ordinary, *triage) for text in texts(s)), recipe.vocab_size)
    renderer = Renderer(tokenizer, (BASH, SUBMIT))
    pairs = {
        "ordinary": examples(ordinary, renderer, world_weight=1.0),
        "triage": examples(triage, renderer, world_weight=recipe.world_weight),
    }
    for name, sessions in pairs.items():
        log.info("%s: %d sessions, %.2f M tokens", name, len(sessions), sum(len(ids) for ids, _ in sessions) / 1e6)
    model = new_model(recipe, len(tokenizer), work)
    learn(model, recipe, pairs, work)
    thinning = Random(recipe.seed)
    kept = [s for s in triage if s["right"] or thinning.random() < recipe.failures_kept]
    log.info("last part: %d sessions of triage", len(kept))
    parts = [examples(sessions, renderer, recipe.last_world_weight) for sessions in (kept, ordinary)]
    last = mixed(*((1, batches(part, recipe.batch_tokens, Random(recipe.seed + 1))) for part in parts))
    train(model, last, recipe.last_steps, recipe.learning_rate, cool=True)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    save(model, tokenizer, recipe, out / "base_model")
    held_out = sorted(read(work / "held_out.jsonl"), key=lambda session: session["id"].split("-")[::-1])  # by seed
    (out / "recorded").mkdir(parents=True, exist_ok=True)
    write_trajectories(out / "recorded/held_out.parquet", [to_trajectory(session, renderer) for session in held_out])


if __name__ == "__main__":
    main()

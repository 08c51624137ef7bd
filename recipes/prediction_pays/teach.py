"""Teach the embedded base model the form of the depots: how to look, to read a code and to submit it, and no map.

    python recipes/prediction_pays/teach.py --out depots_model          # some minutes on one core
    python recipes/prediction_pays/teach.py --told --out told_model     # where `cat` says in which folder a depot is

It watches a script in depots whose map is drawn anew for every task, so there is no place to learn: the script guesses
folders as often wrong as chance says. It learns every token, what is typed and what is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import model_location
from backtalk.messages import Message, ToolCall
from backtalk.tasks.task import Task
from backtalk.trajectory import Segment, TokenRole
from depots import DEPOTS, FOLDERS, ROOT, Depots, DepotWorld

sys.path.append(str(Path(__file__).parents[1] / "base_model"))
from build import batches, drill_batches, mixed, train  # the base model's own batches and optimizer

FIRST = 1_000_000  # of the numbers of tasks that are watched; those of training begin at 0
Turn = tuple[ToolCall, Message | None]  # what is typed, and what is answered
WORLD_WEIGHT = 0.3  # of a token that the script did not write, as in the base model


def folders(depth: int) -> list[str]:
    """Return the folders in which a depot can lie."""
    first = [f"{ROOT}/{folder}" for folder in FOLDERS]
    return first if depth == 1 else [f"{outer}/{inner}" for outer in first for inner in FOLDERS]


async def play(task: Task, depth: int, draw: Random) -> tuple[tuple[Message, ...], list[Turn]]:
    """Return the prompt and the turns of the script at a task: two looks, the first at times by `ls`, and an answer."""
    env = Depots(task)
    depot = task.id.split("/")[1]
    prompt = await env.reset()
    first, second = draw.sample(folders(depth), 2)
    code = str(draw.randrange(1000, 10000))  # a guess, unless one is read
    look = f"ls {first}" if draw.random() < 0.3 else f"cat {first}/{depot}/code"
    turns: list[Turn] = []
    said = ""
    for command in (look, f"cat {second}/{depot}/code"):
        seen = depot in said.split()  # in the listing
        call = ToolCall("bash", {"command": f"cat {first}/{depot}/code" if seen else command})
        message = (await env.step(call)).messages[0]
        turns.append((call, message))
        said = message.text
        if said.isdigit():
            code = said
            break
    return prompt, [*turns, (ToolCall("submit", {"answer": code}), None)]


async def play_told(task: Task, depth: int, draw: Random) -> tuple[tuple[Message, ...], list[Turn]]:
    """Return the prompt and the turns of the script where `cat` says where a depot is: one look, and an answer."""
    env = Depots(task)
    prompt = await env.reset()
    call = ToolCall("bash", {"command": f"cat {draw.choice(folders(depth))}/{task.id.split('/')[1]}/code"})
    message = (await env.step(call)).messages[0]
    code = message.text if message.text.isdigit() else str(draw.randrange(1000, 10000))
    return prompt, [(call, message), (ToolCall("submit", {"answer": code}), None)]


def example(prompt: tuple[Message, ...], turns: list[Turn], renderer: Renderer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids [T] of a session, and their weights in the loss [T]."""
    segments = list(renderer.render_prompt(prompt))
    for number, (call, message) in enumerate(turns):
        segments.append(Segment(TokenRole.ACTION, renderer.encode_action(call), turn=number))
        if message is not None:
            segments += renderer.render_observation((message,), turn=number, closed=True)
    ids = torch.tensor([token for segment in segments for token in segment.token_ids])
    weights = [1.0 if s.role is TokenRole.ACTION else WORLD_WEIGHT for s in segments for _ in s.token_ids]
    return ids, torch.tensor(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=3000, help="of each depth")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--told", action="store_true", help="in the depots in which cat says where they are")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    base = model_location("base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    pairs, renderer = [], None
    for depth in (1, 2):
        world = DepotWorld(depth, redrawn=True, told=arguments.told)
        script = play_told if arguments.told else play
        for number in range(arguments.sessions):
            draw = Random(f"teach/{depth}/{number}")
            task = world.task(draw.choice(DEPOTS[: 12 * depth]), FIRST + number)
            renderer = renderer or Renderer(tokenizer, Depots(task).tools)
            pairs.append(example(*asyncio.run(script(task, depth, draw)), renderer))
    logging.info("%d sessions, %.2f M tokens", len(pairs), sum(len(ids) for ids, _ in pairs) / 1e6)
    data = mixed((3, batches(pairs, 4000, Random(0))), (1, drill_batches(len(tokenizer), 4000, Random(0), first=400)))
    train(model, data, arguments.steps, 3e-3, cool=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()

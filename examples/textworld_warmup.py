"""Show the package's base model, which has only ever seen a shell, some won games of TextWorld-Express.

python examples/textworld_warmup.py runs/textworld_base
backtalk train examples/textworld.yaml

A minute of one core. The games are of the train fold and played as in training, by a policy that is told how to
win; every token that the policy or the game said is then learned, prompts are not.
"""

import asyncio
import random
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from textworld_express import TextWorldExpressEnv
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.env import OpenEnvWorld
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolCall
from backtalk.rollout.groups import run_groups
from backtalk.rollout.sampler import ScriptedSampler
from backtalk.run.config import load_config
from backtalk.settings import from_plain
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole, Trajectory

GAMES, STEPS, BATCH, LEARNING_RATE = 64, 40, 4, 2e-3
config = load_config(Path(__file__).with_name("textworld.yaml"))
(source,) = config.tasks.sources


def winning_commands(tasks: list[Task]) -> dict[str, list[str]]:
    """Return the commands that win each game, by task id, as TextWorld-Express itself finds them."""
    games, game = TextWorldExpressEnv(), source.options["reset"]
    games.load(game["game"], game["params"])
    commands = {}
    for task in tasks:
        games.reset(seed=task.metadata["reset"]["seed"], gameFold="train", generateGoldPath=True)
        commands[task.id] = games.getGoldActionSequence()
    games.close()
    return commands


async def play(renderer: Renderer) -> list[Trajectory]:
    world = OpenEnvWorld(source.name.removeprefix("openenv:"), from_plain(OpenEnvConfig, source.options))
    tasks = world.tasks(Split.TRAIN, GAMES, seed=0)
    commands = winning_commands(tasks)
    limits = replace(config.rollout, max_turns=40)
    shown = renderer.for_tools([action.tool for action in world.actions or ()])

    def encode(command: str) -> tuple[int, ...]:
        return shown.encode_action(ToolCall("bash", {"command": command}))

    def replies(key: str) -> list[str]:  # a key is run/task/rollout, and a task's id has slashes too
        return commands[key.partition("/")[2].rpartition("/")[0]]

    try:
        groups = await run_groups(
            tasks, world.open, ScriptedSampler(replies, encode), renderer, limits, group_size=1, key="warmup"
        )
    finally:
        await world.close()
    return [trajectory for group in groups for trajectory in group if trajectory.reward == 1.0]


def loss_of(model: torch.nn.Module, trajectories: list[Trajectory]) -> torch.Tensor:
    """Return the mean of two cross-entropies in nats a token: of the policy's tokens and of the game's."""
    shape = (len(trajectories), max(map(len, trajectories)))
    ids, roles = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, trajectory in enumerate(trajectories):
        ids[row, : len(trajectory)] = torch.tensor(trajectory.token_ids)
        roles[row, : len(trajectory)] = torch.tensor(trajectory.roles)
    logits = model(input_ids=ids).logits[:, :-1]
    halves = [roles[:, 1:] == role for role in (TokenRole.ACTION, TokenRole.ENV_OUTPUT)]
    return sum(cross_entropy(logits[half], ids[:, 1:][half]) for half in halves if half.any()) / torch.tensor(2.0)


def main(folder: str) -> None:
    base = str(resources.files("backtalk").joinpath("assets/base_model"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    won = asyncio.run(play(Renderer(tokenizer, ())))
    print(f"{len(won)} of {GAMES} games won by their own solutions, {sum(map(len, won)) // len(won)} tokens each")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    draw = random.Random(0)
    for step in range(STEPS):
        loss = loss_of(model, draw.sample(won, BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}/{STEPS}: {loss.item():.2f} nats a token", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved {folder}")


main(sys.argv[1])

"""Train on triage from Python, and look at one attempt afterwards.

python examples/train_both_halves.py runs/example
"""

import asyncio
import sys

from backtalk.run.config import load_config
from backtalk.run.events import StepDone
from backtalk.run.log import RunLog
from backtalk.run.train import train
from backtalk.trajectory import TokenRole

config = load_config("triage", {"steps": 5, "evaluation.tasks": 0, "objective.world_model_coeff": 0.05})


def tell(event: object) -> None:
    if isinstance(event, StepDone):
        reward, ce = event.metrics["reward"], event.metrics["env_output_ce"]
        print(f"step {event.step}: reward {reward:.2f}, environment cross-entropy {ce:.2f} nats a token")


folder = asyncio.run(train(config, sys.argv[1], on_event=tell))
trajectory = next(iter(RunLog(folder).read_groups(4)[0]))
for role in TokenRole:
    print(f"{role.name:<11} {trajectory.count(role):4} tokens")

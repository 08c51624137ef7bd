"""Train a model of the Hugging Face hub in a terminal, with TRL's trainer, on rewards and on what the shell answers.

pip install 'backtalk[trl]'
python trl_terminal.py Qwen/Qwen3-0.6B runs/trl
python trl_terminal.py base runs/trl 20         # the small model of the package, 20 steps: no download
"""

import sys

import torch
from trl import GRPOConfig

from backtalk.envs.terminal import TerminalConfig, TerminalWorld
from backtalk.hosts.trl import EchoGRPOTrainer, WorldRollouts
from backtalk.language.tokenizer import model_location
from backtalk.rollout.limits import RolloutLimits
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split


def main(model: str, folder: str, steps: int = 100) -> EchoGRPOTrainer:
    """Train on questions about small file systems; every rollout has a sandbox of its own."""
    tasks = load_tasks("triage", split=Split.TRAIN, count=256)
    limits = RolloutLimits(max_turns=6, max_tokens=4096, max_tokens_per_turn=256)
    rollouts = WorldRollouts(TerminalWorld(PooledBackend(local_sandbox()), TerminalConfig()), tasks, limits=limits)
    args = GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        learning_rate=1e-5,
        temperature=1.0,
        logging_steps=1,
        report_to="none",
    )
    trainer = EchoGRPOTrainer(
        model_location(model), args=args, train_dataset=rollouts.dataset, rollouts=rollouts, world_model_coeff=0.05
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

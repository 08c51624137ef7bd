"""The tiny model, taught in a few seconds to write shell commands, so that its rollouts are worth training on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backtalk.envs.terminal import BASH, SUBMIT, TerminalConfig
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split
from backtalk.trajectory import TokenRole
from tiny import tiny_model_dir

CALLS = (
    ToolCall("bash", {"command": "ls"}),
    ToolCall("bash", {"command": "echo hello world"}),
    ToolCall("bash", {"command": "cat nothing"}),
    ToolCall("submit", {"answer": "1"}),
    ToolCall("submit", {"answer": "2"}),
)


def taught_model_dir(path: Path, *, steps: int = 40) -> Path:
    """Write the taught model and its tokenizer to ``path`` and return it."""
    tiny_model_dir(path)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    renderer = Renderer(tokenizer, (BASH, SUBMIT))
    rows, targets = [], []
    for number, task in enumerate(load_tasks("triage", split=Split.TRAIN, count=10, levels=(1,), seed=0)):
        messages = (
            Message("system", (Part(TerminalConfig().system_prompt, TokenRole.CONTEXT),)),
            Message("user", (Part(task.instruction, TokenRole.CONTEXT),)),
        )
        prompt = [token for segment in renderer.render_prompt(messages) for token in segment.token_ids]
        action = list(renderer.encode_action(CALLS[number % len(CALLS)]))
        rows.append(torch.tensor(prompt + action))
        targets.append(torch.tensor([-100] * len(prompt) + action))
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets_BT = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=targets_BT).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path

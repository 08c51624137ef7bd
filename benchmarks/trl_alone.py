"""GRPO in a terminal as a user of TRL writes it: TRL's own loop, and of Backtalk the sandbox and the tasks alone.

For benchmarks/engines.py.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from backtalk.envs.terminal import TerminalConfig, TerminalEnv, TerminalWorld
from backtalk.language.tokenizer import model_location
from backtalk.messages import ToolCall
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.task import Task

# The calls that the embedded base model writes, as transformers reads them: <bash>ls</bash>.
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<bash>",
            "close_pattern": r"</bash>\s*",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "bash", "arguments": {"text": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
# The same where an answer is a call too: one that ends nothing, for rollouts of many turns.
ANSWERS_ARE_CALLS = {
    "open_pattern": r"<(?P<name>bash|submit)>",
    "close_pattern": r"</(?:bash|submit)>\s*",
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": {"text": "{content}"}}},
}
# TRL takes templates alone that render calls. Its tool loop appends to sampled tokens and never renders one.
CALLS = "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>"


class CountingTrainer(GRPOTrainer):
    """TRL's trainer, which also counts the tokens of each generation, and those of them that the policy sampled."""

    counts: list[tuple[int, int]]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        actions = (output["completion_mask"] * output["tool_mask"]).sum()
        self.counts.append((int(output["prompt_mask"].sum() + output["completion_mask"].sum()), int(actions)))
        return output


def make_trainer(
    tasks: Sequence[Task], terminal: TerminalConfig, args: GRPOConfig, counts: list[tuple[int, int]]
) -> GRPOTrainer:
    """Return TRL's trainer of the embedded base model on these tasks."""
    folder = model_location("base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = response_template(terminal)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", CALLS)
    rows = [
        {
            "prompt": [
                {"role": "system", "content": terminal.system_prompt},
                {"role": "user", "content": task.instruction.strip()},
            ],
            "task_id": task.id,
        }
        for task in tasks
    ]
    shells = Shells(tasks, terminal)
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        reward_funcs=shells.reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=shells.environment,
    )
    trainer.counts = counts
    return trainer


def response_template(terminal: TerminalConfig) -> dict[str, Any]:
    """Return how calls are read; without the tool submit an answer is a call that is answered."""
    if "submit" in terminal.tools:
        return RESPONSES
    calls = {key: value for key, value in RESPONSES["fields"]["tool_calls"].items() if key != "open"}
    return RESPONSES | {"fields": RESPONSES["fields"] | {"tool_calls": calls | ANSWERS_ARE_CALLS}}


class Shells:
    """Terminals for the rollouts of a trainer, whose tools are ordinary functions; their event loop is a thread."""

    def __init__(self, tasks: Sequence[Task], terminal: TerminalConfig) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.tools = terminal.tools
        self.world = TerminalWorld(PooledBackend(local_sandbox()), terminal)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def environment(self) -> Terminal:
        return Terminal(self) if "submit" in self.tools else EndlessTerminal(self)

    def reward(self, completions: Sequence[Any], environments: Sequence[Terminal], **kwargs: Any) -> list[float]:
        """Score all rollouts of a batch at once, by the answers that their last messages submit."""
        scores = [env._score(messages[-1]["content"]) for env, messages in zip(environments, completions, strict=True)]

        async def together() -> list[float]:
            return await asyncio.gather(*scores)

        return self.run(together())


class Terminal:
    """An environment of TRL's kind; TRL takes its public methods as tools."""

    def __init__(self, shells: Shells) -> None:
        self._shells = shells
        self._env: TerminalEnv | None = None

    def reset(self, task_id: str, **row: Any) -> None:
        self._shells.run(self._open(self._shells.tasks[task_id]))

    def bash(self, text: str) -> str:
        """
        Run a bash command.

        Args:
            text: The command.
        """
        return self._step(ToolCall("bash", {"command": text}))

    def _step(self, call: ToolCall) -> str:
        assert self._env is not None
        step = self._shells.run(self._env.step(call))
        return "".join(part.text for message in step.messages for part in message.parts)

    async def _open(self, task: Task) -> None:
        self._stack = AsyncExitStack()
        self._env = await self._stack.enter_async_context(self._shells.world.open(task))
        await self._env.reset()

    async def _score(self, message: str) -> float:
        assert self._env is not None
        try:
            if answer := re.search("<submit>(.*)</submit>", message, re.DOTALL):
                await self._env.step(ToolCall("submit", {"answer": answer[1]}))
            return float(await self._env.score() or 0.0)
        finally:
            await self._stack.aclose()


class EndlessTerminal(Terminal):
    """One in which an answer is told that there is no such tool, so that only a budget ends a rollout."""

    def submit(self, text: str) -> str:
        """
        Give an answer.

        Args:
            text: The answer.
        """
        return self._step(ToolCall("submit", {"answer": text}))

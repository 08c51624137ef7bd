"""Measure how long a growing history takes to tokenize: appending turns, against rendering all of it each turn.

    python benchmarks/renderer.py --tokenizer Qwen/Qwen3-0.6B      a folder or a name

Every turn the policy has said a call, the world answers some hundred tokens, and the next prompt is wanted. CPU
seconds of the process, the median over the rounds; "first" is a renderer that has not met conversations of this
shape, so that it has to ask the template every turn. ``renderers`` is the PyPI package, where it is installed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoTokenizer

from backtalk.language.renderer import Action, Renderer
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.trajectory import TokenRole

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
BASH = ToolSpec("bash", "Run a command.", SCHEMA)
WORDS = (
    "total drwxr-xr-x -rw-r--r-- agent root 4096 Jan notes.txt src/main.py error: warning: 12:03:44 GET /index 200 (ok)"
)


def answer(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(WORDS.split()) + rng.choice(["  ", " ", "\n"]) for _ in range(words))


def conversation(args: argparse.Namespace) -> tuple[str, list[tuple[ToolCall, str]]]:
    rng = random.Random(0)
    calls = [ToolCall("bash", {"command": f"grep -n error {number}.log | head"}) for number in range(args.turns)]
    return "Find the broken log.", [(call, answer(rng, args.words)) for call in calls]


def play_appending(make: Callable[[], Renderer], task: str, turns: Sequence[tuple[ToolCall, str]]) -> int:
    r = make()
    prompt = [Message("user", (Part(task, TokenRole.CONTEXT),))]
    said: list[Message | Action] = [*prompt]
    ids = [token for segment in r.render_prompt(prompt) for token in segment.token_ids]
    for turn, (call, text) in enumerate(turns):
        action = r.encode_action(call)
        said.append(action)
        seen = [Message("tool", (Part(text, TokenRole.ENV_OUTPUT),), "bash")]
        assert r.can_append(said, seen)
        ids += action
        for segment in r.render_observation(seen, turn=turn, closed=True):
            ids += segment.token_ids
        said += seen
    return len(ids)


def play_again(r: Renderer, task: str, turns: Sequence[tuple[ToolCall, str]]) -> int:
    """Render and tokenize the whole conversation each turn, without token roles."""
    chat: list[dict[str, Any]] = [{"role": "user", "content": task}]
    schema = {"name": BASH.name, "description": BASH.description, "parameters": dict(BASH.parameters)}
    tools = [{"type": "function", "function": schema}]
    ids: list[int] = []
    for call, text in turns:
        said = r.encoder.decode(r.encode_action(call)[:-1])
        chat += [{"role": "assistant", "content": said}, {"role": "tool", "content": text}]
        ids = r.tokenizer.apply_chat_template(
            chat, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return len(ids)


def play_bridge(oracle: Any, r: Renderer, task: str, turns: Sequence[tuple[ToolCall, str]]) -> int:
    ids = oracle.render_ids([{"role": "user", "content": task}], add_generation_prompt=True)
    for call, text in turns:
        result = oracle.bridge_to_next_turn(ids, list(r.encode_action(call)), [{"role": "tool", "content": text}])
        ids = result.token_ids
    return len(ids)


def bridging(tokenizer: Any) -> Any | None:
    try:
        from renderers import create_renderer
        from renderers.configs import Qwen3RendererConfig
    except ImportError:
        return None
    is_qwen = "<|im_start|>" in tokenizer.get_added_vocab()
    return create_renderer(tokenizer, Qwen3RendererConfig(enable_thinking=False)) if is_qwen else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--turns", type=int, default=128)
    parser.add_argument("--words", type=int, default=240, help="of an observation")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    task, turns = conversation(args)
    warm, oracle = Renderer(tokenizer, (BASH,)), bridging(tokenizer)
    methods: dict[str, Callable[[int], int]] = {
        "appended": lambda n: play_appending(lambda: warm, task, turns[:n]),
        "appended, first": lambda n: play_appending(lambda: Renderer(tokenizer, (BASH,)), task, turns[:n]),
        "whole template again": lambda n: play_again(warm, task, turns[:n]),
    }
    if oracle is not None:
        methods["renderers, bridge"] = lambda n: play_bridge(oracle, warm, task, turns[:n])
    sizes = [n for n in (8, 16, 32, 64, 128, 256) if n <= args.turns]
    print(f"{'turns':>6} {'tokens':>8}  " + "".join(f"{name + ' s':>26}{'ratio':>7}" for name in methods))
    for n in sizes:
        row: dict[str, float] = {}
        tokens = 0
        for name, play in methods.items():
            seconds = []
            for round_number in range(args.rounds + 1):
                start = time.process_time()
                length = play(n)
                if round_number > 0:  # the first warms up
                    seconds.append(time.process_time() - start)
            tokens = length if name == "appended" else tokens
            row[name] = statistics.median(seconds)
        base = row["appended"]
        print(f"{n:6} {tokens:8}  " + "".join(f"{seconds:26.3f}{seconds / base:7.1f}" for seconds in row.values()))


if __name__ == "__main__":
    main()

"""What a policy knows of its environment, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backtalk.envs.terminal import BASH
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall
from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
from backtalk.run.log import RunLog
from backtalk.run.world_model import Answer, find_answers, lines_of, measure_world_model, other_answer, written_text
from backtalk.trajectory import Segment, TokenRole, Trajectory
from tiny import tiny_tokenizer

EXIT = "\n[exit code 1]"
ENV, WARNING, CONTEXT = TokenRole.ENV_OUTPUT, TokenRole.WARNING, TokenRole.CONTEXT


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), (BASH,))


def rollout(renderer: Renderer, turns: Sequence[tuple[str, str]], index: int = 0) -> Trajectory:
    """Make a rollout of commands, and what they are answered with."""
    segments = list(renderer.render_prompt([Message("user", (Part("look", CONTEXT),))]))
    for turn, (command, output) in enumerate(turns):
        ids = renderer.encode_action(ToolCall("bash", {"command": command}))
        segments.append(Segment(TokenRole.ACTION, ids, None, turn))
        parts = (Part(output, ENV), Part("\n[exit code 1]", WARNING))
        segments += renderer.render_observation([Message("tool", parts, "bash")], turn=turn, closed=True)
    return Trajectory(task_id="a", sample_index=index, segments=tuple(segments))


class Oracle:
    """An engine that gives environment output 0.25 nats a token, and 1 after a CONTEXT that is no prompt of its own."""

    def __init__(self, renderer: Renderer, replies: Sequence[str]) -> None:
        self.sampler_of = lambda params: ScriptedSampler(replies, renderer.encode_text)

    def sampler(self, params: SamplingParams) -> ScriptedSampler:
        assert params.temperature == 0
        return self.sampler_of(params)

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        return [[-1.0 if len(t.segments) == 2 else -0.25] * len(t) for t in trajectories]

    async def score_tokens(self, trajectories: Sequence[Trajectory], alternatives: int) -> list[Any]:
        """Score as ``score`` does; in the second half of all places another token is likelier, with 0.35."""
        assert alternatives == 1
        expected = [{i: ((0, math.log(0.35)),) for i in range(len(t) // 2, len(t))} for t in trajectories]
        scores = zip(await self.score(trajectories), expected, strict=True)
        return [SimpleNamespace(logprobs=logprobs, expected=others) for logprobs, others in scores]


async def test_knowledge_by_hand(renderer: Renderer, tmp_path: Path) -> None:
    turns = [("cat notes.txt", "cat: notes.txt: No such file\nfirst line\nsecond line\nthird line")]
    rollouts = [rollout(renderer, turns), rollout(renderer, [("ls", "a b c")], 1)]
    engine: Any = Oracle(renderer, ["first line\nthird line \nand more\n[exit code 1]"])
    measured = await measure_world_model(engine, renderer, {"recorded": rollouts, "own": []}, step=3)
    assert measured["sets"]["own"] is None
    found, texts = measured["sets"]["recorded"], [turns[0][1], "a b c"]
    tokens = sum(t.count(ENV) for t in rollouts)
    assert found["by_role"]["env_output"] == {
        "nats": pytest.approx(0.25 * tokens),
        "tokens": tokens,
        "bytes": sum(len(text) for text in texts),
        "ce_per_token": pytest.approx(0.25),
        "ce_per_byte": pytest.approx(0.25 * tokens / sum(len(text) for text in texts)),
    }
    assert found["by_tool"] == {"bash": found["by_role"]["env_output"]}
    assert found["by_role"]["warning"]["tokens"] == sum(t.count(WARNING) for t in rollouts)
    copied = found["by_origin"]["copied"]  # what stands in the command too, in runs of three tokens or more
    assert copied["tokens"] + found["by_origin"]["new"]["tokens"] == tokens and 0 < copied["bytes"] <= len(
        "cat notes.txt"
    )

    right = [sum(r is ENV for r in t.roles[: len(t) // 2]) for t in rollouts]
    assert found["tasks"][0]["correct"] == sum(right)
    assert found["estimates"]["token_accuracy"]["value"] == pytest.approx(sum(right) / tokens)
    bins = {row["low"]: row for row in found["calibration"]["bins"] if row["tokens"]}
    assert {low: (row["tokens"], row["accuracy"]) for low, row in bins.items()} == {
        0.3: (tokens - sum(right), 0.0),
        0.7: (sum(right), 1.0),  # exp(-0.25) = 0.779
    }
    error = ((1 - math.exp(-0.25)) * sum(right) + 0.35 * (tokens - sum(right))) / tokens
    assert found["calibration"]["ece"] == pytest.approx(error, abs=1e-6)

    # Each answer against the other's: 0.25 nats a token against 1.
    assert (found["tasks"][0]["pairs"], found["tasks"][0]["preferred"]) == (2, 2)
    assert found["estimates"]["margin"]["value"] == pytest.approx(0.75)
    # Of "first line", "third line", "and more" and the warning, the first has 3 among its 5 lines, the second 1 of 2.
    task = found["tasks"][0]
    assert (task["answers"], task["exact"], task["lines"], task["predicted_lines"]) == (2, 0, 7, 8)
    assert task["matched_lines"] == 4 and found["estimates"]["line_precision"]["value"] == 0.5
    first, second = found["examples"]
    assert (first["key"], first["true"], first["other"]) == ("a/0/0", f"{turns[0][1]}{EXIT}", f"a b c{EXIT}")
    assert (first["true_ce"], first["other_ce"], second["other"]) == (0.25, 1.0, first["true"])
    assert "cat notes.txt" in first["command"] and first["written"].startswith("first line\nthird line \nand more")

    log = RunLog(tmp_path)
    log.write_world_model(3, measured)
    assert log.read_world_model(3) == json.loads(json.dumps(measured)) and log.read_world_model(4) is None
    log.truncate_after(1)
    assert log.read_world_model(3) is None


def test_another_answer_is_of_another_command_and_not_in_the_history(renderer: Renderer) -> None:
    first = rollout(renderer, [("ls", "a b c"), ("cat a", "apples"), ("ls", "a b c d")])
    second = rollout(renderer, [("cat b", "pears")], 1)
    answers = [answer for t in (first, second) for answer in find_answers(t, renderer)]
    assert [a.text for a in answers] == [f"{x}\n[exit code 1]" for x in ("a b c", "apples", "a b c d", "pears")]
    assert first.token_ids[answers[1].start :][: len(answers[1].body)] == answers[1].body
    assert renderer.encoder.decode(answers[1].before).endswith(
        renderer.encoder.decode(first.token_ids[: answers[1].start])[-8:]
    )

    def others(answer: Answer) -> set[str]:
        chosen = (other_answer(Answer(**{**fields(answer), "key": str(i)}), answers) for i in range(40))
        return {other.text.split("\n")[0] for other in chosen if other}

    assert others(answers[0]) == {"apples", "pears"}  # not the other ls
    assert others(answers[1]) == {"a b c d", "pears"}  # the first ls is in the history
    assert others(answers[3]) == {"a b c", "apples", "a b c d"}
    assert other_answer(answers[3], answers[3:]) is None
    forked = Trajectory(task_id="a", sample_index=0, segments=(*first.segments, Segment(CONTEXT, (1,), branch=1)))
    assert find_answers(forked, renderer) == []


def fields(answer: Answer) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in answer.__dataclass_fields__}


def test_what_a_policy_wrote_ends_where_the_template_would_end_it(renderer: Renderer) -> None:
    ids = renderer.encode_text("total 3\n</tool_response>\nmore")
    assert written_text(ids, True, renderer, "</tool_response>") == "total 3\n"
    assert written_text(ids[:-1], False, renderer, "") == "total 3\n</tool_response>\nmore"
    assert lines_of(" a \n\n  \nb") == [" a", "b"]

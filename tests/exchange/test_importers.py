"""Other libraries' records as trajectories. The oracles: numbers worked out by hand, the renderer that wrote the ids,
the text of real recorded terminals, and the published accounting of one episode.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.errors import ConfigError, DataError, RenderError
from backtalk.exchange.read.chat import trajectory_from_chat
from backtalk.exchange.read.files import Imported, cut_to, import_files, import_record
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.openenv import awm_messages
from backtalk.exchange.read.trl import trajectory_from_trl
from backtalk.exchange.read.turns import About, Turn, trajectory_from_turns, turns_of
from backtalk.exchange.read.verifiers import trajectory_from_trace
from backtalk.exchange.read.wrappers import TERMINUS, Wrappers
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.messages import Message, Part
from backtalk.run.log import read_trajectories, write_trajectories
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory
from outside_data import ATIF, AWM, needs
from tiny import CHAT_TEMPLATE, tiny_tokenizer

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
ABOUT = About(task_id="t")
ALL_ENV = Observations(role=ENV)


# As Llama 3 does it: what a tool said is written as a JSON string.
ESCAPING_TEMPLATE = CHAT_TEMPLATE.replace("m['content']", "(m['content'] | tojson if m.role == 'tool' else m.content)")

# As Qwen3 does it: an assistant's message before the last user's message is written in another way.
REWRITING_TEMPLATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


@cache
def renderer(template: str = CHAT_TEMPLATE) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, [], RendererConfig(on_drift="stop" if template == CHAT_TEMPLATE else "fork"))


def renderer_of(_tools: object) -> Renderer:
    return renderer()


def decode(ids: tuple[int, ...]) -> str:
    return renderer().tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)


def shape(trajectory: Trajectory) -> list[tuple[TokenRole, tuple[int, ...], int | None]]:
    return [(s.role, s.token_ids, s.turn) for s in trajectory.segments]


def text_of_role(trajectory: Trajectory, *roles: TokenRole) -> str:
    return decode(tuple(t for s in trajectory.segments if s.role in roles and s.turn is not None for t in s.token_ids))


# ---------------------------------------------------------------- turns of ids

TWO_TURNS = [Turn((1, 2), (3, 4), (-0.5, -0.25)), Turn((1, 2, 3, 4, 5, 6), (7,), (-1.5,))]


def test_an_observation_is_what_a_prompt_has_after_the_last_turn() -> None:
    trajectory = trajectory_from_turns(TWO_TURNS, About(task_id="t", reward=0.5), ALL_ENV)
    assert shape(trajectory) == [
        (CONTEXT, (1, 2), None),
        (ACTION, (3, 4), 0),
        (ENV, (5, 6), 0),
        (ACTION, (7,), 1),
    ]
    assert trajectory.logprobs == (None, None, -0.5, -0.25, None, None, -1.5)
    assert trajectory.reward == 0.5
    assert dict(trajectory.stats) == {"num_turns": 2.0}


def test_a_completion_without_logprobs_is_unsampled() -> None:
    trajectory = trajectory_from_turns([Turn((1,), (3, 4))], ABOUT, ALL_ENV)
    assert shape(trajectory) == [(CONTEXT, (1,), None), (ACTION, (3, 4), 0)]
    assert (trajectory.num_unsampled_turns, trajectory.stats) == (1, {"num_turns": 1.0})


def test_tokens_that_may_not_be_trained_are_unsampled() -> None:
    turn = Turn((1,), (3, 4, 5), (-1.0, -2.0, -3.0), sampled=(True, False, True))
    trajectory = trajectory_from_turns([turn], ABOUT, ALL_ENV)
    assert shape(trajectory)[1:] == [(ACTION, (3,), 0), (ACTION, (4,), 0), (ACTION, (5,), 0)]
    assert (trajectory.logprobs, trajectory.num_turns) == ((None, -1.0, None, -3.0), 1)


def test_roles_are_never_guessed() -> None:
    with pytest.raises(DataError, match=r"after turn 0 \(2 tokens\).*--model, or say that all of it.*observation-role"):
        trajectory_from_turns(TWO_TURNS, ABOUT, Observations())
    with pytest.raises(ValueError, match="role=ACTION"):
        Observations(role=ACTION)


def test_drift_is_refused_with_the_place() -> None:
    drifted = [TWO_TURNS[0], Turn((1, 2, 3, 9, 5), (7,), (-1.5,))]
    with pytest.raises(
        DataError, match=r"turn 1 .* 4 tokens of turn 0: at position 3 expected \[1, 2, 3, 4\], got \[1, 2, 3, 9, 5\]"
    ):
        trajectory_from_turns(drifted, ABOUT, ALL_ENV)
    shorter = [TWO_TURNS[0], Turn((1, 2), (7,), (-1.5,))]
    with pytest.raises(DataError, match=r"at position 2 expected \[1, 2, 3, 4\], got \[1, 2\]"):
        trajectory_from_turns(shorter, ABOUT, ALL_ENV)


def test_drift_may_begin_a_branch_where_the_past_is_context() -> None:
    turns = [TWO_TURNS[0], Turn((1, 9, 5), (7,), (-1.5,)), Turn((1, 9, 5, 7, 8), (6,), (-2.0,))]
    trajectory = trajectory_from_turns(turns, ABOUT, replace(ALL_ENV, on_drift="fork"))
    assert [shape_of(branch) for branch in trajectory.branches] == [
        [(CONTEXT, (1, 2), None), (ACTION, (3, 4), 0)],
        [(CONTEXT, (1, 9, 5), None), (ACTION, (7,), 1), (ENV, (8,), 1), (ACTION, (6,), 2)],
    ]
    assert trajectory.stats["drifts"] == 1


def shape_of(segments: tuple[Segment, ...]) -> list[tuple[TokenRole, tuple[int, ...], int | None]]:
    return [(s.role, s.token_ids, s.turn) for s in segments]


def test_a_branch_keeps_the_roles_of_an_observation_whose_text_is_known() -> None:
    r = renderer()
    said = (Message("tool", (Part("2 files", ENV),), "bash"),)
    first = tuple(r.encode_text("ls"))
    observation = tuple(t for s in r.render_observation(said, turn=0, closed=True) for t in s.token_ids)
    start = tuple(t for s in r.render_prompt([Message("user", (Part("task", CONTEXT),))]) for t in s.token_ids)
    rewritten = (*start, *r.encode_text("..."), *observation)
    turns = [Turn(start, first, (-1.0,) * len(first), observation=said), Turn(rewritten, (7,), (-1.0,))]
    trajectory = trajectory_from_turns(turns, ABOUT, Observations(renderer=r, on_drift="fork"))
    branch = trajectory.branches[1]
    assert [s.role for s in branch] == [CONTEXT, TEMPLATE, ENV, TEMPLATE, ACTION]
    assert branch[2].turn == 0
    assert decode(branch[2].token_ids) == "2 files"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([{"prompt_ids": [1], "completion_ids": [2, 3], "logprobs": [-1.0]}], "2 tokens has 1 logprobs"),
        ([{"prompt_ids": [1], "completion_ids": [2], "logprobs": [float("nan")]}], "turn 0 logprobs.0. is nan"),
        ([{"prompt_ids": [1], "completion_ids": [2], "logprobs": [float("-inf")]}], "turn 0 logprobs.0. is -inf"),
        ([{"prompt_ids": [1], "completion_ids": [-2]}], "completion ids.0. is -2"),
        ([{"prompt_ids": [1.5], "completion_ids": [2]}], "prompt ids.0. is 1.5"),
        ([{"completion_ids": [2]}], "no 'prompt_token_ids' or 'prompt_ids'"),
        ([], "at least one turn"),
        ({"prompt_token_ids": [[1], [2]], "completion_token_ids": [[1]]}, "same turns, got.*2.*1"),
    ],
)
def test_damaged_turns_are_refused(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        turns_of(record)


def test_the_columns_of_each_library_are_read() -> None:
    harbor = {"prompt_token_ids": [[1, 2]], "completion_token_ids": [[3, 4]], "logprobs": [[-0.5, -0.25]]}
    trl = [{"prompt_ids": [1, 2], "output_ids": [3, 4], "output_log_probs": [-0.5, -0.25], "output_mask": None}]
    openenv = {
        "schema_version": 1,
        "turns": [
            {
                "node_id": "n",
                "prompt_token_ids": [1, 2],
                "completion_token_ids": [3, 4],
                "per_token_logps": [-0.5, -0.25],
                "loss_mask": [0, 0, 1, 1],
            }
        ],
    }
    assert turns_of(harbor) == turns_of(trl) == [TWO_TURNS[0]]
    assert turns_of(openenv) == [Turn((1, 2), (3, 4), (-0.5, -0.25), (True, True))]


# ---------------------------------------------------------------- finding bodies in ids

BODIES = st.lists(
    st.lists(
        st.sampled_from(["<|im_end|>", "\n", ")", " ", "user", "tool\n", "<|im_start|>tool\n", "🙂", "漢", "total 12"]),
        max_size=4,
    ).map("".join),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=60)
@given(BODIES, st.booleans(), st.sampled_from([CHAT_TEMPLATE, ESCAPING_TEMPLATE]))
@example(["(exit_code=0)"], True, CHAT_TEMPLATE)
@example([""], False, CHAT_TEMPLATE)
@example(['a "quoted" \\n \n', ""], True, ESCAPING_TEMPLATE)
@example(["", "<|im_end|>\n<|im_start|>tool\n"], True, CHAT_TEMPLATE)
def test_bodies_are_found_in_ids_exactly_as_they_were_rendered(bodies: list[str], closed: bool, template: str) -> None:
    r = renderer(template)
    messages = [Message("tool", (Part(body, ENV),)) for body in bodies]
    wanted = r.render_observation(messages, turn=3, closed=closed)
    ids = tuple(t for s in wanted for t in s.token_ids)
    for told in (closed, not closed):  # whether the completion held the end of turn is seen in the ids
        found = Observations(renderer=r).segments(ids, turn=3, closed=told)
        assert [t for s in found for t in [s.role] * len(s)] == [t for s in wanted for t in [s.role] * len(s)]
        assert tuple(t for s in found for t in s.token_ids) == ids


def test_ids_that_another_template_wrote_are_refused_or_taken_whole() -> None:
    ids = renderer().encode_text("something else")
    with pytest.raises(DataError, match="does not write 'something else"):
        Observations(renderer=renderer()).segments(ids, turn=0, closed=True)
    (segment,) = Observations(renderer=renderer(), role=WARNING).segments(ids, turn=0, closed=True, tools=["bash"])
    assert segment == Segment(WARNING, ids, turn=0, tool="bash")


def test_users_in_ids_are_what_the_caller_says() -> None:
    r = renderer()
    wanted = r.render_observation([Message("user", (Part("go on", CONTEXT),))], turn=0, closed=True)
    ids = tuple(t for s in wanted for t in s.token_ids)
    assert Observations(renderer=r).segments(ids, turn=0, closed=True) == wanted
    found = Observations(renderer=r, user_role=ENV).segments(ids, turn=0, closed=True)
    assert [s.role for s in found] == [TEMPLATE, ENV, TEMPLATE]


# ---------------------------------------------------------------- messages

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/srv", "n": 2}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "notes.txt"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Thanks."},
]


def test_messages_become_given_text_and_observations() -> None:
    record = {"task_id": "count", "messages": CHAT, "reward": 1}
    trajectory = import_record(record, "chat", renderer_of)
    assert decode(trajectory.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        'I look.\n<tool_call>\n{"name": "ls", "arguments": {"path": "/srv", "n": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nnotes.txt<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n"
    )
    (observation,) = [s for s in trajectory.segments if s.role is ENV]
    assert (decode(observation.token_ids), observation.turn, observation.tool) == ("notes.txt", 0, "ls")
    assert text_of_role(trajectory, ACTION).endswith("</tool_call><|im_end|>1<|im_end|>")
    assert text_of_role(trajectory, CONTEXT).endswith("Thanks.")
    assert (trajectory.task_id, trajectory.reward, trajectory.messages) == ("count", 1.0, tuple(CHAT))
    assert trajectory.stats == {"num_turns": 2, "user_messages": 1, "dropped_reasonings": 1}
    assert trajectory.num_unsampled_turns == 2


def test_a_template_that_rewrites_the_past_begins_a_branch() -> None:
    trajectory = import_record(CHAT, "chat", lambda _: renderer(REWRITING_TEMPLATE), Observations(user_role=ENV))
    first, second = trajectory.branches
    assert decode(tuple(t for s in first for t in s.token_ids)).endswith(
        "tool\nnotes.txt<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n1<|im_end|>"
    )
    assert [decode(s.token_ids) for s in first if s.role is ENV] == ["notes.txt"]
    assert [decode(s.token_ids) for s in second if s.role is ENV] == ["Thanks."]
    assert "notes.txt" in decode(tuple(t for s in second if s.role is CONTEXT for t in s.token_ids))
    assert trajectory.stats["drifts"] == 1


def test_users_and_reasoning_as_the_options_say() -> None:
    options = Observations(user_role=ENV, keep_reasoning=True)
    trajectory = import_record(CHAT, "chat", renderer_of, options, name="here")
    assert trajectory.task_id == "here"
    assert text_of_role(trajectory, ENV) == "notes.txtThanks."
    assert "<think>\nhm\n</think>\n\nI look." in decode(trajectory.token_ids)
    assert "dropped_reasonings" not in trajectory.stats


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:2], "a prompt and then an assistant's"),
        (CHAT[2:], "a prompt and then an assistant's"),
        ([*CHAT[:2], CHAT[4], CHAT[4]], "messages 2 and 3 are both the assistant's"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "holds 'image_url'; only text"),
        ([{"role": "critic", "content": ""}], "role 'critic'"),
        ([*CHAT[:2], {"role": "assistant", "content": "a<|im_end|>b"}], "token 1 of .* ends the turn"),
        (
            [*CHAT[:2], {"role": "assistant", "tool_calls": [{"function": {"name": "ls", "arguments": "{"}}]}],
            "not JSON",
        ),
        (
            [*CHAT[:2], {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "3"}}]}],
            "no object",
        ),
    ],
)
def test_conversations_that_cannot_be_told_are_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_record(messages, "chat", renderer_of)


def test_messages_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(DataError, match="pass --model"):
        import_record(CHAT, "chat")


# ---------------------------------------------------------------- what harnesses write around observations

TERMINAL = (
    "Previous response had warnings:\nWARNINGS: - Extra text detected before JSON object\n\n"
    "New Terminal Output:\n\nroot@a:/# ls -a\n.\nls -a\nroot@a:/#\n\n\n"
)


def test_terminus_is_split_into_harness_and_world() -> None:
    parts = TERMINUS.split(TERMINAL, ["ls -a\n"])
    assert "".join(part.text for part in parts) == TERMINAL
    assert [part.text for part in parts if part.role is ENV] == [".\nls -a\n"]
    failed = "Previous response had parsing errors:\nERROR: x\nWARNINGS: - y\n\nPlease fix these issues and provide a "
    assert {part.role for part in TERMINUS.split(failed + "proper JSON response.")} == {WARNING}
    asked = (
        "Current terminal state:\nNew Terminal Output:\n\n$\n\n\nAre you sure you want to mark the task as complete? "
    )
    assert [part.text for part in TERMINUS.split(asked + "Yes.") if part.role is ENV] == ["$"]
    cut = "a\n[... output limited to 10000 bytes; 5 interior bytes omitted ...]\nNew Terminal Output:\nb"
    assert [part.text for part in TERMINUS.split(cut) if part.role is ENV] == ["a", "New Terminal Output:\nb"]


@given(st.text(max_size=20), st.lists(st.text(max_size=5), max_size=3))
@settings(deadline=None)
def test_splitting_loses_no_text(text: str, commands: list[str]) -> None:
    for wrappers in (TERMINUS, Wrappers((r"\s+",), echoes=True)):
        assert "".join(part.text for part in wrappers.split(text, commands)) == text


# ---------------------------------------------------------------- Harbor


@cache
def real_atif() -> tuple[list[dict[str, Any]], Imported]:
    with gzip.open(ATIF, "rt") as file:
        return [json.loads(line) for line in file], import_files([ATIF], "atif", renderer_of)


@needs(ATIF)
def test_real_terminals_are_imported_without_loss() -> None:
    records, imported = real_atif()
    assert not imported.refusals
    assert len(imported.trajectories) == len(records) == 60
    assert imported.total("num_turns") == 662
    assert sum(t.reward or 0 for t in imported.trajectories) == sum(r["reward"] for r in records)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    for trajectory in imported.trajectories:
        record = by_task[trajectory.task_id][trajectory.sample_index]
        steps = record["trajectory"]["steps"]
        assert trajectory.reward == record["reward"]
        assert list(trajectory.messages) == steps
        said = "".join(step["observation"]["results"][0]["content"] for step in steps if step["source"] == "agent")
        assert text_of_role(trajectory, ENV, WARNING) == said
        assert trajectory.num_unsampled_turns == trajectory.num_turns
        told = text_of_role(trajectory, ENV)
        assert "Previous response had" not in told
        assert "New Terminal Output:" not in told
        assert "Are you sure you want to mark" not in told


def atif_with_ids() -> tuple[dict[str, Any], tuple[int, ...]]:
    """A trajectory whose second prompt is what the renderer makes of the first turn."""
    r = renderer()
    prompt = [t for s in r.render_prompt([Message("user", (Part("task", CONTEXT),))]) for t in s.token_ids]
    action = list(r.encode_text("ls"))
    said = "New Terminal Output:\n\n$ ls\nnotes.txt"
    parts = (Message("user", (Part(said, ENV),)),)
    observation = [t for s in r.render_observation(parts, turn=0, closed=True) for t in s.token_ids]

    def agent(number: int, prompt_ids: list[int], ids: list[int], content: str) -> dict[str, Any]:
        return {
            "step_id": number,
            "source": "agent",
            "message": "",
            "tool_calls": [{"tool_call_id": "c", "function_name": "bash", "arguments": {"keystrokes": "ls\n"}}],
            "observation": {"results": [{"source_call_id": "c", "content": content}]},
            "metrics": {"prompt_token_ids": prompt_ids, "completion_token_ids": ids, "logprobs": [-1.0] * len(ids)},
        }

    steps = [
        {"step_id": 1, "source": "user", "message": "task"},
        agent(2, prompt, action, said),
        agent(3, [*prompt, *action, *observation], action, "New Terminal Output:\n\n$ done"),
    ]
    record = {"schema_version": "ATIF-v1.8", "session_id": "s", "agent": {"name": "terminus-2"}, "steps": steps}
    return record, tuple([*prompt, *action, *observation, *action])


def test_atif_with_ids_keeps_them_and_learns_from_the_last_observation() -> None:
    record, ids = atif_with_ids()
    trajectory = import_record(record, "atif", renderer_of, Observations(user_role=ENV))
    assert trajectory.token_ids[: len(ids)] == ids
    assert trajectory.task_id == "s"
    assert text_of_role(trajectory, ENV) == "notes.txt$ done"
    assert text_of_role(trajectory, WARNING) == "New Terminal Output:\n\n$ ls\nNew Terminal Output:\n\n"
    assert {s.tool for s in trajectory.segments if s.role is ENV} == {"bash"}
    assert trajectory.num_turns == 2
    assert import_record({**record, "subagent_trajectories": [{}]}, "atif", renderer_of).stats["subagents"] == 1
    del record["steps"][2]["metrics"]["completion_token_ids"]
    with pytest.raises(DataError, match="1 of 2 model calls have token ids"):
        import_record(record, "atif", renderer_of)


def test_copied_steps_are_given_text() -> None:
    record, _ = atif_with_ids()
    for step in record["steps"]:
        step.pop("metrics", None)
    record["steps"][1]["is_copied_context"] = True
    trajectory = import_record(record, "atif", renderer_of)
    assert text_of_role(trajectory, ENV) == "$ done"
    assert trajectory.num_turns == trajectory.stats["num_turns"] == 1  # a copied step is given text, not an action


# ---------------------------------------------------------------- TRL


def test_trl_masks_become_turns() -> None:
    row = {
        "prompt_ids": [1, 2],
        "completion_ids": [3, 4, 5, 6, 7, 8, 0],
        "tool_mask": [1, 1, 0, 0, 1, 0, 1],  # trl pads it with 1
        "completion_mask": [1, 1, 1, 1, 1, 1, 0],
        "logprobs": [-0.5, -0.25, 0.0, 0.0, -1.5, 0.0, 0.0],
    }
    trajectory = trajectory_from_trl(row, ABOUT, ALL_ENV)
    assert shape(trajectory) == [
        (CONTEXT, (1, 2), None),
        (ACTION, (3, 4), 0),
        (ENV, (5, 6), 0),
        (ACTION, (7,), 1),
        (ENV, (8,), 1),
    ]
    assert trajectory.logprobs == (None, None, -0.5, -0.25, None, None, -1.5, None)
    with pytest.raises(DataError, match="completion_ids 7, tool_mask 6"):
        trajectory_from_trl({**row, "tool_mask": [1] * 6}, ABOUT, ALL_ENV)
    with pytest.raises(DataError, match="0 everywhere"):
        trajectory_from_trl({**row, "completion_mask": [0] * 7}, ABOUT, ALL_ENV)
    with pytest.raises(DataError, match="0 at position 2"):
        trajectory_from_trl({**row, "completion_mask": [1, 1, 0, 1, 1, 1, 1]}, ABOUT, ALL_ENV)


def test_a_batch_of_trl_is_one_trajectory_a_row(tmp_path: Path) -> None:
    batch = {"prompt_ids": [[1], [1, 2]], "completion_ids": [[3], [4, 5]], "logprobs": [[-1.0], [-2.0, -3.0]]}
    path = tmp_path / "batch.json"
    path.write_text(json.dumps(batch))
    imported = import_files([path], "trl")
    assert [t.token_ids for t in imported.trajectories] == [(1, 3), (1, 2, 4, 5)]
    assert [t.sample_index for t in imported.trajectories] == [0, 1]


# ---------------------------------------------------------------- verifiers


def node(parent: int | None, role: str, ids: list[int], **fields: Any) -> dict[str, Any]:
    return {"parent": parent, "message": {"role": role, "content": "x"}, "token_ids": ids, **fields}


def sampled(parent: int, ids: list[int]) -> dict[str, Any]:
    mask = [False, *[True] * (len(ids) - 1)]
    return node(parent, "assistant", ids, sampled=True, mask=mask, logprobs=[-0.5] * (len(ids) - 1))


def trace() -> dict[str, Any]:
    tool = {"mask": [False] * 3, "is_content": [False, True, False]}
    return {
        "nodes": [
            node(None, "user", [1, 2], mask=[False] * 2, is_content=[False, True]),
            sampled(0, [3, 4, 5]),
            node(1, "tool", [6, 7, 8], **tool),
            sampled(2, [9, 10]),
            sampled(2, [9, 11]),  # the same history, answered again
        ],
        "rewards": {"a": {"score": 0.5, "weight": 2.0}, "b": None, "c": {"score": 0.25}},
        "stop_condition": "max_turns",
        "ok": True,
    }


def test_a_trace_of_verifiers_trains_every_node_once() -> None:
    trajectory = trajectory_from_trace(trace(), ABOUT, Observations())
    assert [shape_of(branch) for branch in trajectory.branches] == [
        [
            (CONTEXT, (1, 2), None),
            (TEMPLATE, (3,), None),
            (ACTION, (4, 5), 0),
            (TEMPLATE, (6,), 0),
            (ENV, (7,), 0),
            (TEMPLATE, (8,), 0),
            (TEMPLATE, (9,), 0),
            (ACTION, (10,), 1),
        ],
        [
            (CONTEXT, (1, 2), None),
            (CONTEXT, (3, 4, 5), None),
            (CONTEXT, (6, 7, 8), None),
            (TEMPLATE, (9,), 1),
            (ACTION, (11,), 2),
        ],
    ]
    assert trajectory.reward == 1.25
    assert trajectory.stop_reason is StopReason.MAX_TURNS


def test_traces_that_say_too_little_are_refused() -> None:
    record = trace()
    record["nodes"][2]["is_content"] = []
    with pytest.raises(DataError, match=r"has no is_content.*--observation-role"):
        trajectory_from_trace(record, ABOUT, Observations())
    whole = trajectory_from_trace(record, ABOUT, ALL_ENV)
    assert whole.count(ENV) == 3
    record["nodes"][1]["logprobs"] = [-0.5]
    with pytest.raises(DataError, match="2 sampled tokens and 1 logprobs"):
        trajectory_from_trace(record, ABOUT, ALL_ENV)
    record["nodes"][1]["parent"] = 4
    with pytest.raises(DataError, match="node 1 has parent 4"):
        trajectory_from_trace(record, ABOUT, ALL_ENV)


def test_an_error_in_a_trace_is_no_reward_of_0() -> None:
    failed = {**trace(), "ok": False, "errors": [{"type": "SandboxError", "message": "gone"}], "rewards": {}}
    trajectory = trajectory_from_trace(failed, ABOUT, Observations())
    assert trajectory.reward is None
    assert trajectory.stop_reason is StopReason.FAILED
    assert trajectory.failure is not None
    assert trajectory.failure.message == "gone"
    assert trajectory.count(ENV) == 1


# ---------------------------------------------------------------- OpenEnv


def char_renderer(text: str) -> Renderer:
    """One token a character; results in a <tool_response>, as the published accounting writes them."""
    letters = sorted({*text, *'[body 12]\ue000\ue0010\n"\\<&'})
    backend = Tokenizer(models.WordLevel({**{c: i for i, c in enumerate(letters)}, "<unk>": len(letters)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<tool_response>\\n' + m.content + '\\n</tool_response>\\n' }}"
        "{% else %}{{ m.content }}{% if m.role == 'assistant' %}{{ '<|end|>\\n' }}{% endif %}{% endif %}{% endfor %}"
    )
    return Renderer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template), [])


@needs(AWM)
def test_an_agent_world_model_episode_counts_as_published() -> None:
    """1,304 context, 588 action, 4,659 environment, 0 warning, of characters that have one before them.

    The publication takes the result's <tool_response> for environment output and writes a newline after each call;
    with us the first is TEMPLATE and the second stands between the end of turn and the result.
    """
    episode = json.loads(AWM.read_text())
    preamble = "." * 205  # as long as the published one
    prompt = f"{preamble}\n\nTask: {episode['task']}\nAvailable tools: {', '.join(episode['tools'])}\n"
    messages = awm_messages(episode, prompt)
    renderer = char_renderer(prompt + json.dumps(episode) + "<tool_call></tool_call><tool_response>")
    trajectory = trajectory_from_chat(messages, ABOUT, Observations(renderer=renderer))
    calls = 6
    context = sum(len(s) for s in trajectory.segments if s.turn is None)
    written = trajectory.count(ACTION)
    observed = trajectory.count(ENV)
    scaffold = sum(len(s) for s in trajectory.segments if s.role is TEMPLATE and s.turn is not None)
    assert context - 1 == 1304
    assert written == 588  # the end of turn stands where the published text has a newline
    assert observed + scaffold - calls == 4659
    assert scaffold - calls == calls * len("<tool_response>\n\n</tool_response>\n")
    assert trajectory.count(WARNING) == 0
    imported = import_record(episode, "openenv", renderer_of)
    assert (imported.task_id, imported.reward, imported.num_turns) == ("e_commerce_33/0", 0.0, calls)


AWM_STEPS = [
    {"action": {"tool_name": "get", "arguments": {"n": 1}}, "observation": {"warning": "hm", "tool_result": "ok"}},
    {"action": {"tool_name": "verify"}, "observation": {"verify_result": {"a": 1}, "reward_type": "others"}},
]


def test_a_warning_of_the_agent_world_model_is_no_environment_output() -> None:
    observation = {"warning": "be careful", "tool_result": None, "error": "no such item"}
    episode = {"task": "buy", "steps": [{"action": {"tool_name": "get"}, "observation": observation}]}
    parts = awm_messages(episode)[2].parts
    assert parts == (Part("be careful\n", WARNING), Part('{"error": "no such item"}', ENV))


def test_an_episode_record_is_chat() -> None:
    record = {"episode_id": "e1", "messages": CHAT, "reward": 0.0, "done": True, "tool_trace": []}
    trajectory = import_record(record, "openenv", renderer_of)
    assert (trajectory.task_id, trajectory.reward) == ("e1", 0.0)
    assert text_of_role(trajectory, ENV) == "notes.txt"
    with pytest.raises(DataError, match="turns, messages or steps"):
        import_record({"episode_id": "e1"}, "openenv", renderer_of)


# ---------------------------------------------------------------- files and the command


def write_turns(path: Path) -> None:
    good = {"task": "a", "reward": 1.0, "turns": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}]}
    other = {"task": "b", "turns": good["turns"]}
    bad = {"task": "a", "turns": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": []}, {}]}
    lines = [json.dumps(good), "{not json", json.dumps(other), "", json.dumps(bad), json.dumps({**good, "reward": 0.0})]
    path.write_text("\n".join(lines) + "\n")


def test_a_broken_line_costs_itself_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    write_turns(path)
    imported = import_files([path], "turns")
    assert [(t.task_id, t.sample_index, t.reward) for t in imported.trajectories] == [
        ("a", 0, 1.0),
        ("a", 1, 0.0),
        ("b", 0, None),
    ]
    assert [refusal.where for refusal in imported.refusals] == [f"{path}:2", f"{path}:5"]
    assert "is not JSON" in imported.refusals[0].reason
    assert "turn 1 has no 'prompt_token_ids'" in imported.refusals[1].reason


def places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


def replaced(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[path[0]] = replaced(record[path[0]], path[1:], value)
    return copy


WHOLE: dict[str, Any] = {
    "chat": {"messages": CHAT, "tools": [], "reward": 1.0},
    "atif": {"trajectory": atif_with_ids()[0], "reward": 1, "task": "t"},
    "turns": {"turns": [{"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0], "loss_mask": [1]}]},
    "trl": {"prompt_ids": [1], "completion_ids": [2, 3], "tool_mask": [1, 0], "logprobs": [-1.0, 0.0]},
    "verifiers": trace(),
    "openenv": {"scenario": "s", "task_idx": 0, "task": "buy", "tools": ["get"], "steps": AWM_STEPS, "reward": 0.0},
    "rfc010": {"token_ids": [1], "action_mask": [1], "obs_mask": [0], "warning_mask": [0], "logprobs": [-1.0]},
}
ODD = st.sampled_from([None, True, -1, 1e400, float("nan"), "", "x", [], [1], [None], [[1]], {}, {"a": 1}, [{}], 2**70])


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(sorted(WHOLE)), ODD)
def test_a_damaged_record_never_ends_an_import(data: st.DataObject, source: Any, odd: Any) -> None:
    place = data.draw(st.sampled_from(places(WHOLE[source])))
    records = [("1", replaced(WHOLE[source], place, odd)), ("2", WHOLE[source])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backtalk.exchange.read.files.read_records", lambda path: iter(records))
        imported = import_files([Path("a")], source, renderer_of, Observations(role=ENV))
    assert len(imported.trajectories) + len(imported.refusals) == 2
    assert [refusal.where for refusal in imported.refusals] in ([], ["1"])
    with tempfile.TemporaryDirectory() as folder:
        write_trajectories(f"{folder}/a.parquet", imported.trajectories)
        assert tuple(map(apart_from_messages, read_trajectories(f"{folder}/a.parquet"))) == tuple(
            map(apart_from_messages, imported.trajectories)
        )


def apart_from_messages(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, messages=())  # they may hold a NaN, which equals nothing


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.jsonl.gz", b"no gzip"), ("a.parquet", b"no parquet"), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            import_files([tmp_path / name], "turns")
    with pytest.raises(DataError, match="cannot read"):
        import_files([tmp_path / "absent.jsonl"], "turns")
    with pytest.raises(ConfigError, match="use chat, atif, harbor"):
        import_files([], "csv")  # pyright: ignore[reportArgumentType]


def test_cutting_keeps_whole_turns() -> None:
    trajectory = trajectory_from_turns(
        [*TWO_TURNS, Turn((1, 2, 3, 4, 5, 6, 7, 8), (9,), (-1.0,))], ABOUT, ALL_ENV
    )  # turns end at 6, 8 and 9 tokens
    assert cut_to(trajectory, 9) is trajectory
    for limit, length in ((8, 8), (7, 6), (6, 6)):
        cut = cut_to(trajectory, limit)
        assert len(cut) == length
        assert cut.stop_reason is StopReason.MAX_TOKENS
        assert cut.stats["cut_tokens"] == 9 - length
    with pytest.raises(DataError, match="--max-tokens 5"):
        cut_to(trajectory, 5)


def test_what_the_model_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"turns": [{"prompt_ids": [1] * 9, "completion_ids": [2]}]}))
    refused = import_files([path], "turns", longest=9)
    assert "10 tokens, and the model's context holds 9; --max-tokens 9" in refused.refusals[0].reason


def run_import(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_writes_the_good_ones_and_fails(tmp_path: Path) -> None:
    source, out = tmp_path / "turns.jsonl", tmp_path / "out.parquet"
    write_turns(source)
    code, said = run_import(source, "--format", "turns", "--out", out)
    assert code == 1
    assert f"{source}:2: " in said
    assert [t.task_id for t in read_trajectories(out)] == ["a", "a", "b"]
    source.write_text("\n".join(source.read_text().split("\n")[:1]) + "\n")
    code, said = run_import(source, "--format", "turns", "--out", out)
    assert code == 0
    assert len(read_trajectories(out)) == 1


def test_the_command_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps(CHAT) + "\n")
    with pytest.raises(ConfigError, match=r"ends in '.csv'"):
        run_import(source, "--format", "chat", "--out", tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="nothing could be imported"):
        run_import(source, "--format", "turns", "--out", tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="no regular expression"):
        run_import(source, "--format", "chat", "--out", tmp_path / "o.parquet", "--warning", "(", "--harness", "none")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_chat_through_the_command_with_the_embedded_model(tmp_path: Path, suffix: str) -> None:
    source, out = tmp_path / "chat.jsonl", tmp_path / f"out{suffix}"
    source.write_text(json.dumps({"id": "c", "messages": CHAT, "reward": 0.5}) + "\n")
    code, said = run_import(source, "--format", "chat", "--model", "base", "--out", out, "--user-role", "env_output")
    assert code == 0
    assert "which no policy term trains): 2" in said
    (trajectory,) = read_trajectories(out)
    assert (trajectory.task_id, trajectory.reward, trajectory.messages) == ("c", 0.5, tuple(CHAT))
    assert trajectory.count(ENV) > 0


def spec(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


@pytest.mark.parametrize("tool_format", [ToolFormat.HERMES, ToolFormat.QWEN3_CODER])
def test_parquet_gives_the_tokens_of_json_lines(tmp_path: Path, tool_format: ToolFormat) -> None:
    """Arrow fills what one struct has and another has not with null: in arguments, in schemas, at any depth."""
    where = {"type": "object", "properties": {"path": {"type": "string"}}}
    tools = [
        spec("bash", command={"type": "string"}, seconds={"type": "integer"}),
        spec("move", to=where, how={"enum": ["fast", None], "type": "string"}),
        spec("submit", answer={"type": "string", "minLength": 1}),
    ]
    said: list[dict[str, Any]] = [{"role": "user", "content": "Count."}]
    for number, (tool, arguments) in enumerate(
        [("bash", {"command": "ls"}), ("move", {"to": {"path": "/a"}}), ("bash", {}), ("submit", {"answer": "1"})]
    ):
        call = {"id": str(number), "type": "function", "function": {"name": tool, "arguments": arguments}}
        said.append({"role": "assistant", "content": None, "tool_calls": [call]})
        said.append({"role": "tool", "tool_call_id": str(number), "content": "ok"})
    record = {"id": "r", "messages": said, "tools": tools}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "chat.parquet")
    text = {"id": "r", "messages": json.dumps(said), "tools": json.dumps(tools)}  # as many data sets keep them
    pq.write_table(pa.Table.from_pylist([text]), tmp_path / "text.parquet")
    (tmp_path / "chat.jsonl").write_text(json.dumps(record) + "\n")

    def of(told: Any) -> Renderer:
        return Renderer(tiny_tokenizer(), told, RendererConfig(tool_format=tool_format))

    found = [import_files([tmp_path / name], "chat", of) for name in ("chat.jsonl", "chat.parquet", "text.parquet")]
    (lines,), *others = (imported.trajectories for imported in found)
    assert [other.segments for (other,) in others] == [lines.segments] * 2
    assert '"minLength": 1' in decode(lines.token_ids) and "None" not in decode(lines.token_ids)
    assert decode(lines.token_ids).count("null") == 1  # of the enum, which is a list


def test_a_null_argument_survives_in_json_lines_and_in_text(tmp_path: Path) -> None:
    def record(arguments: object) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "move", "arguments": arguments}}
        return {"messages": [CHAT[1], {"role": "assistant", "tool_calls": [call]}]}

    def said(path: Path) -> str:
        renderer = Renderer(tiny_tokenizer(), [], RendererConfig(tool_format=ToolFormat.HERMES))
        (trajectory,) = import_files([path], "chat", lambda _: renderer).trajectories
        return decode(trajectory.token_ids)

    null = {"path": "/a", "speed": None}
    (tmp_path / "n.jsonl").write_text(json.dumps(record(null)))
    pq.write_table(pa.Table.from_pylist([record(json.dumps(null))]), tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist([record(null | {"speed": None})]), tmp_path / "struct.parquet")
    kept = '{"path": "/a", "speed": null}'
    assert [kept in said(tmp_path / name) for name in ("n.jsonl", "text.parquet", "struct.parquet")] == [1, 1, 0]
    assert '"arguments": {"path": "/a"}' in said(tmp_path / "struct.parquet")


def test_a_call_that_a_format_cannot_hold_is_refused() -> None:
    plain = Renderer(tiny_tokenizer(), [], RendererConfig(tool_format=ToolFormat.HERMES))
    assert import_record(CHAT, "chat", lambda _: plain).count(ENV) > 0
    with pytest.raises((RenderError, ConfigError)):
        tags = Renderer(tiny_tokenizer(), [], RendererConfig(tool_format=ToolFormat.TAGS))
        import_record(CHAT, "chat", lambda _: tags)

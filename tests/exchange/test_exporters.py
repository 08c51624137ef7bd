"""Trajectories for others and back. The oracles: OpenEnv's own classes, and equality after the way there and back."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tomllib
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.errors import ConfigError, DataError
from backtalk.exchange.detect import guess_format
from backtalk.exchange.read.files import import_record
from backtalk.exchange.rfc010 import from_rfc010, to_rfc010
from backtalk.exchange.write.inspect_ai import to_inspect
from backtalk.exchange.write.openenv import to_episode_record, to_training_trace
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import model_location
from backtalk.messages import ToolCall
from backtalk.run.log import read_trajectories, write_trajectories
from backtalk.run.log.sources import read_rollouts, record_reader
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
runner = CliRunner()

# Ids are of the embedded model, so that the command line can read them too.
SAMPLED = Trajectory(
    task_id="t",
    sample_index=3,
    policy_version=7,
    segments=(
        Segment(TEMPLATE, (1,)),
        Segment(CONTEXT, (20, 21)),
        Segment(ACTION, (30, 2), (-0.5, -0.25), turn=0),
        Segment(TEMPLATE, (40,), turn=0, tool="bash"),
        Segment(WARNING, (50,), turn=0, tool="bash"),
        Segment(ENV, (60, 61), turn=0, tool="bash"),
        Segment(TEMPLATE, (41,), turn=0, tool="bash"),
        Segment(ACTION, (31, 32), (-1.5, -0.125), turn=1),
        Segment(ENV, (62, 63, 64), turn=1, tool="bash"),
    ),
    messages=(
        {"role": "user", "content": "do"},
        {"role": "assistant", "content": "ls"},
        {"role": "tool", "content": "a b", "tool": "bash"},
        {"role": "assistant", "content": "cat"},
        {"role": "tool", "content": "c", "tool": "bash"},
    ),
    reward=0.5,
    stop_reason=StopReason.ENV_DONE,
    stats={"num_turns": 2.0},
)
# A second history begins with the observation of turn 1, after which turn 2 is sampled.
BRANCHED = replace(
    SAMPLED,
    segments=(
        *SAMPLED.segments[:-1],
        Segment(CONTEXT, (20, 21, 32), branch=1),
        Segment(ENV, (62, 63), turn=1, tool="bash", branch=1),
        Segment(ACTION, (33,), (-2.0,), turn=2, branch=1),
        Segment(CONTEXT, (20,), branch=2),
        Segment(ENV, (65,), turn=2, tool="bash", branch=2),
    ),
)
# As a capture of a script: the first turn was sampled by nobody.
SCRIPTED_FIRST = replace(
    SAMPLED,
    segments=tuple(replace(s, logprobs=None) if i == 2 else s for i, s in enumerate(SAMPLED.segments)),
)
SCRIPTED = replace(
    SAMPLED,
    segments=tuple(replace(s, logprobs=None) if s.role is ACTION else s for s in SAMPLED.segments),
)
FAILED = replace(
    SAMPLED, reward=None, stop_reason=StopReason.FAILED, failure=Failure("step", "SandboxError", "it broke")
)


@cache
def base_renderer() -> Renderer:
    return Renderer.from_pretrained(model_location("base"), (), RendererConfig(on_drift="fork"))


@cache
def openenv() -> Any:
    """OpenEnv's own EpisodeRecord and TrainingTrace."""
    pytest.importorskip("openenv", reason="pip install 'backtalk[openenv]'")
    from openenv.core.harness.collect import EpisodeRecord
    from openenv.core.harness.training import TrainingTrace

    return EpisodeRecord, TrainingTrace


def wire(record: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(record, allow_nan=False))


def read_back(record: dict[str, Any]) -> Trajectory:
    assert guess_format(record) == "openenv"
    return import_record(record, "openenv")


def test_what_the_agent_wrote_is_an_action_with_and_without_logprobs() -> None:
    # Text that an observation carries is given, also where it stands first in a turn of its own.
    given = replace(SCRIPTED, segments=(*SCRIPTED.segments[:3], Segment(CONTEXT, (9,), turn=7), *SCRIPTED.segments[3:]))
    mask = [0, 0, 0, 1, 1, *[0] * 6, 1, 1, 0, 0, 0]
    assert [int(x) for x in to_rfc010(given)["action_mask"]] == mask
    assert [action["arguments"]["command"] for action in to_episode_record(
        SCRIPTED, calls_of=lambda ids: [ToolCall("bash", {"command": str(list(ids))})]
    )["tool_trace"]] == ["[30, 2]", "[31, 32]"]  # fmt: skip


def test_an_unsampled_action_is_in_the_masks_of_a_training_trace_and_in_no_completion() -> None:
    (turn,) = to_training_trace(SCRIPTED_FIRST)["turns"]
    assert turn["completion_token_ids"] == [31, 32]
    assert turn["metadata"]["backtalk"]["before"]["action_mask"] == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_a_training_trace_has_the_sampled_ids_and_where_the_observations_are() -> None:
    trace = to_training_trace(SAMPLED)
    first, second = trace["turns"]
    assert (first["prompt_token_ids"], first["completion_token_ids"]) == ([1, 20, 21], [30, 2])
    assert (first["per_token_logps"], first["loss_mask"]) == ([-0.5, -0.25], [0, 0, 0, 1, 1])
    assert second["prompt_token_ids"] == [1, 20, 21, 30, 2, 40, 50, 60, 61, 41]
    assert second["loss_mask"] == [0] * 10 + [1, 1]
    assert first["metadata"]["observation"] == {
        "token_ids": [40, 50, 60, 61, 41],
        "action_mask": [0, 0, 0, 0, 0],
        "obs_mask": [0, 0, 1, 1, 0],
        "warning_mask": [0, 1, 0, 0, 0],
    }
    assert first["metadata"]["env_output_mask"] == [0] * 5
    assert second["metadata"]["env_output_mask"] == [0] * 7 + [1, 1, 0] + [0, 0]  # beside its loss_mask
    assert second["metadata"]["observation"]["obs_mask"] == [1, 1, 1]  # the last observation is in no prompt
    last = to_training_trace(BRANCHED)["turns"][-1]  # of a history that was rewritten
    assert (last["prompt_token_ids"], last["completion_token_ids"]) == ([20, 21, 32, 62, 63], [33])
    assert last["metadata"]["env_output_mask"] == [0, 0, 0, 1, 1, 0]
    everything = to_training_trace(SAMPLED, world_loss_target="all")
    assert everything["turns"][1]["metadata"]["env_output_mask"] == [0] * 6 + [1, 1, 1, 0] + [0, 0]
    assert everything["turns"][0]["metadata"]["observation"]["obs_mask"] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("trajectory", [SAMPLED, BRANCHED, SCRIPTED_FIRST, FAILED])
def test_a_training_trace_is_openenvs_and_comes_back_whole(trajectory: Trajectory) -> None:
    _, trace_class = openenv()
    record = wire(to_training_trace(trajectory))
    assert trace_class.model_validate(record).model_dump(exclude_defaults=False)["turns"][0]["loss_mask"]
    assert read_back(trace_class.model_validate(record).model_dump()) == trajectory


@pytest.mark.parametrize("trajectory", [SAMPLED, BRANCHED, SCRIPTED])
def test_an_episode_record_is_openenvs_and_comes_back_whole(trajectory: Trajectory) -> None:
    record_class, _ = openenv()
    record = record_class(**wire(to_episode_record(trajectory))).to_dict()
    assert (record["episode_id"], record["reward"], record["done"]) == ("t/3/7", 0.5, True)
    assert record["messages"][2] == {"role": "tool", "content": "a b", "name": "bash"}
    assert read_back(record) == trajectory


def test_an_episode_record_knows_its_calls_where_they_can_be_read() -> None:
    def calls_of(ids: Any) -> list[ToolCall]:
        return [ToolCall("bash", {"command": str(ids[0])})]

    trace = to_episode_record(SAMPLED, calls_of=calls_of)["tool_trace"]
    assert [(entry["arguments"]["command"], entry["result"]["data"]) for entry in trace] == [("30", "a b"), ("31", "c")]
    assert [entry["result"]["done"] for entry in trace] == [False, True]
    with pytest.raises(DataError, match="2 actions and 1 messages of the assistant"):
        to_episode_record(replace(SAMPLED, messages=SAMPLED.messages[:3]), calls_of=calls_of)


def test_what_a_record_cannot_say_is_refused() -> None:
    with pytest.raises(DataError, match=r"no reward \(it failed at step\).*0 would be a lie"):
        to_episode_record(FAILED)
    with pytest.raises(DataError, match="no action with logprobs"):
        to_training_trace(SCRIPTED)


def test_a_trace_that_was_changed_is_refused() -> None:
    record = wire(to_training_trace(SAMPLED))
    record["turns"][1]["prompt_token_ids"][0] = 9
    with pytest.raises(DataError, match="the prompt of turn 1 is not what the turns before it add up to"):
        read_back(record)


def test_rfc010_takes_anything() -> None:
    for trajectory in (SAMPLED, BRANCHED, SCRIPTED, SCRIPTED_FIRST, FAILED):
        assert from_rfc010(wire(to_rfc010(trajectory))) == trajectory


@pytest.mark.parametrize("kind", ["rfc010", "episode-record", "training-trace", "atif"])
def test_the_command_writes_each_format_and_import_reads_it(kind: str, tmp_path: Path) -> None:
    write_trajectories(tmp_path / "in.parquet", [SAMPLED, FAILED])
    out = tmp_path / "out.jsonl"
    done = runner.invoke(app, ["export", str(tmp_path / "in.parquet"), "--format", kind, "--out", str(out)])
    refused = kind == "episode-record"  # the failed one has no reward
    assert done.exit_code == (1 if refused else 0), done.output
    assert f"Written: {1 if refused else 2} to" in done.output
    assert ("0 would be a lie" in done.output) == refused
    source = {"rfc010": "rfc010", "atif": "atif"}.get(kind, "openenv")
    assert {guess_format(json.loads(line)) for line in out.read_text().splitlines()} == {source}
    if kind != "atif":  # which has no place for the roles of the prompt
        back = tmp_path / "back.jsonl"
        assert runner.invoke(app, ["import", str(out), "--format", source, "--out", str(back)]).exit_code == 0
        assert read_trajectories(back)[0] == replace(SAMPLED, sample_index=0)


def test_a_log_of_inspect_holds_each_rollout_as_a_sample(tmp_path: Path) -> None:
    limited = replace(SAMPLED, stop_reason=StopReason.MAX_TURNS, task_id="u")
    source, out = tmp_path / "t.jsonl", tmp_path / "log.json"
    write_trajectories(source, [SAMPLED, FAILED, limited])
    done = runner.invoke(app, ["export", str(source), "--format", "inspect", "--out", str(out)])
    assert done.exit_code == 0 and "Written: 3" in done.output, done.output
    log = json.loads(out.read_text())
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [("t", 1), ("t", 2), ("u", 1)]
    assert log["eval"]["task"] == "t" and log["results"]["scores"][0]["metrics"]["mean"]["value"] == 0.5
    first, second, third = read_rollouts([out], record_reader(base_renderer().for_tools)).trajectories
    assert [(m["role"], m["content"]) for m in first.messages] == [(m["role"], m["content"]) for m in SAMPLED.messages]
    assert (first.task_id, first.reward, third.stop_reason) == ("t/t", 0.5, StopReason.MAX_TURNS)
    assert second.reward is None and second.failure is not None and "it broke" in second.failure.message


def test_a_log_of_inspect_is_one_that_inspect_reads(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log", reason="pip install inspect-ai, to hold our logs against its classes")
    out = tmp_path / "log.json"
    out.write_text(json.dumps(to_inspect([SAMPLED, FAILED], task="t", model_name="base")))
    read = log.read_eval_log(str(out))
    sample, broken = read.samples
    assert [message.text for message in sample.messages] == ["do", "ls", "a b", "cat", "c"]
    assert (sample.scores["reward"].value, sample.messages[2].function) == (0.5, "bash")
    assert broken.error.message == "SandboxError in step: it broke" and read.results.scores[0].name == "reward"


def test_traces_are_logged_as_trackio_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="pip install trackio, to log traces")
    write_trajectories(tmp_path / "t.jsonl", [SAMPLED, FAILED])
    out = tmp_path / "logs" / "mine.db"
    export = ["export", str(tmp_path / "t.jsonl"), "--format", "trackio", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "backtalk.cli", *export], capture_output=True, text=True)
    assert done.returncode == 0 and "Written: 2" in done.stdout, done.stderr
    with closing(sqlite3.connect(out)) as database:
        rows = database.execute(
            "SELECT run_name, step, messages, metadata, spans FROM traces ORDER BY rowid"
        ).fetchall()
    (run, step, *first), (_, _, *second) = rows
    messages, metadata, spans = map(json.loads, first)
    _, broken, (root, *_) = map(json.loads, second)
    assert (run, step, metadata["reward"], metadata["tokens"]["ACTION"]) == ("t", 7, 0.5, 4)
    assert [m["content"] for m in messages] == ["do", "ls", "a b", "cat", "c"]
    assert [(s["kind"], s.get("usage")) for s in spans] == [
        ("span", None), ("generation", {"input_tokens": 3, "output_tokens": 2}), ("tool", None),
        ("generation", {"input_tokens": 10, "output_tokens": 2}), ("tool", None),
    ]  # fmt: skip
    assert broken["status"] == root["status"] == "error" and "it broke" in root["error"]


def test_the_command_writes_for_other_trainers(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "in.parquet", [SAMPLED, FAILED])
    source, toml, rows = str(tmp_path / "in.parquet"), tmp_path / "algo.toml", tmp_path / "rows.jsonl"
    setting = ["--set", "objective.world_model_coeff=0.1"]
    done = runner.invoke(app, ["export", source, "--format", "prime-rl", "--out", str(toml), *setting])
    assert done.exit_code == 0, done.output
    # One rollout with 4 actions, 6 tokens of observations and 5 of output: 0.1 * 5 / 6, as prime-rl's term is a mean.
    roles = tomllib.loads(toml.read_text())["orchestrator"]["train"]["algo"]["roles"]
    assert roles == {"tool": {"alpha": pytest.approx(0.1 * 5 / 6, rel=1e-5)}}
    done = runner.invoke(app, ["export", source, "--format", "verl", "--out", str(rows), *setting])
    assert done.exit_code == 1  # the failed one has no reward
    assert "Written: 1 to" in done.output and "would learn from it as from a reward of 0" in done.output
    assert f"echo_aux_token_loss_coeff={0.1 * 5 / 6:.6g}" in done.output
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["aux_token_loss_mask"] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    for wrong in (["--format", "prime-rl", "--out", str(rows)], ["--format", "atif", "--out", str(rows), *setting]):
        assert isinstance(runner.invoke(app, ["export", source, *wrong]).exception, ConfigError)


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "in.jsonl", [FAILED])
    base = ["export", str(tmp_path / "in.jsonl"), "--format", "episode-record", "--out"]
    assert "nothing could be exported" in str(runner.invoke(app, [*base, str(tmp_path / "o.jsonl")]).exception)
    assert "end the name in .jsonl" in str(runner.invoke(app, [*base, str(tmp_path / "o.parquet")]).exception)


# ---------------------------------------------------------------- which format a record has


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ([{"role": "user", "content": "x"}], "chat"),
        ({"messages": [], "reward": 1}, "chat"),
        ({"schema_version": "ATIF-v1.7", "steps": []}, "atif"),
        ({"trajectory": {"steps": [{"source": "user"}]}, "reward": 0}, "atif"),
        ({"schema_version": 1, "turns": []}, "openenv"),
        ({"scenario": "s", "steps": [{"action": {}}]}, "openenv"),
        ({"episode_id": "e", "tool_trace": [], "messages": []}, "openenv"),
        ({"turns": []}, "turns"),
        ([{"prompt_ids": [1]}], "turns"),
        ({"rollout_details": []}, "turns"),
        ({"prompt_ids": [1], "completion_ids": [2]}, "trl"),
        ({"nodes": []}, "verifiers"),
        ({"input_ids": [1], "action_mask": [0], "obs_mask": [1], "warning_mask": [0]}, "rfc010"),
    ],
)
def test_the_format_is_found_by_the_fields(record: Any, kind: str) -> None:
    assert guess_format(record) == kind


@pytest.mark.parametrize("record", [{"x": 1}, "text", 7])
def test_a_record_of_no_format_is_refused(record: Any) -> None:
    with pytest.raises(DataError, match=r"no known format|a record is an object or a list"):
        guess_format(record)


def test_files_of_ours_and_of_others_are_read_together(tmp_path: Path) -> None:
    def no_renderer(tools: Any) -> Any:
        raise AssertionError("nothing here has to be rendered")

    write_trajectories(tmp_path / "ours.parquet", [SAMPLED])
    lines = [wire(to_rfc010(SAMPLED)), wire(to_rfc010(SAMPLED)), {"x": 1}]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    found = read_rollouts([tmp_path / "ours.parquet", tmp_path / "theirs.jsonl"], record_reader(no_renderer))
    assert found.trajectories[0] == SAMPLED
    assert [one.sample_index for one in found.trajectories[1:]] == [1, 2]  # attempts at one task
    assert [refusal.where.rpartition(":")[2] for refusal in found.refusals] == ["3", "4"]

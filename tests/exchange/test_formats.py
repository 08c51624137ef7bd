"""Files of other tools, as their own code writes them: who said what, the task, the reward and the reason for the end.

The files under data/ were written by mini-swe-agent 2.4.6 itself, with a scripted model; the others are of the shape
that the tools' sources give.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.evidence.account.characters import transcribed
from backtalk.exchange.detect import guess_format
from backtalk.exchange.read.files import Imported, Rollout, import_files, rows_of
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.spellings import chat_messages
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.messages import ToolCall
from backtalk.run.log import read_trajectories
from backtalk.run.log.sources import read_rollouts
from backtalk.trajectory import StopReason, TokenRole, Trajectory
from tiny import tiny_tokenizer

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
DATA = Path(__file__).parent / "data"
GO = {"role": "user", "content": "Go"}
LS = ToolCall("bash", {"cmd": "ls"})
ASK = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"cmd": "ls"}'}}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def in_characters(path: Path) -> Imported:
    """Read a file without naming its format, one token a character."""

    def read(rollout: Rollout) -> Trajectory:
        assert rollout.source is not None
        found = transcribed(rollout.record, rollout.source, rollout.file)
        assert found is not None
        return found

    return read_rollouts([path], read)


def said(trajectory: Trajectory, role: TokenRole) -> str:
    text = "".join(chr(t) for s in trajectory.segments if s.role is role and s.turn is not None for t in s.token_ids)
    return text.replace("<tool_response>\n", "").replace("\n</tool_response>\n", "")


def one(path: Path) -> Trajectory:
    found = in_characters(path)
    assert not found.refusals, found.refusals
    (trajectory,) = found.trajectories
    renderer = Renderer(tiny_tokenizer(), [], RendererConfig(on_drift="fork"))
    (imported,) = import_files([path], None, renderer.for_tools).trajectories  # the other way to read it agrees
    assert (imported.task_id, imported.reward, imported.stop_reason) == (
        trajectory.task_id,
        trajectory.reward,
        trajectory.stop_reason,
    )
    assert imported.num_turns == imported.num_unsampled_turns == trajectory.num_turns
    assert (imported.count(ENV) > 0, imported.count(WARNING) > 0) == (
        bool(trajectory.count(ENV)),
        said(trajectory, WARNING) != "",
    )
    return trajectory


# ---------------------------------------------------------------- mini-swe-agent


@pytest.mark.parametrize("name", ["text", "items", "calls"])
def test_mini_swe_agent_as_it_writes_it(name: str) -> None:
    trajectory = one(DATA / f"mini_{name}.traj.json")
    newline = "\\n" if name == "calls" else "\n"  # there the output stands in JSON
    assert said(trajectory, ENV) == f"a.py{newline}x = 1{newline}"
    around = ('{\n  "returncode": %d,\n  "output": "', '"\n}') if name == "calls" else (
        "<returncode>%d</returncode>\n<output>\n", "</output>")  # fmt: skip
    assert said(trajectory, WARNING) == around[0] % 0 + around[1] + around[0] % 1 + around[1]
    assert (trajectory.task_id, trajectory.reward, trajectory.num_turns) == (f"mini_{name}", None, 3)
    assert said(trajectory, CONTEXT) == ""


def test_mini_swe_agents_exit_is_no_message_but_the_reason_for_the_end(tmp_path: Path) -> None:
    run = json.loads((DATA / "mini_text.traj.json").read_text())
    for status, stop in (("LimitsExceeded", StopReason.MAX_TURNS), ("TimeExceeded", StopReason.DEADLINE)):
        run["messages"][-1]["extra"]["exit_status"] = status
        assert one(written(tmp_path / "django-1.traj.json", run)).stop_reason is stop
    run["messages"][-1] = {
        "role": "exit",
        "content": "gone",
        "extra": {"exit_status": "ConnectionError", "exception_str": "gone", "submission": ""},
    }
    failed = one(written(tmp_path / "django-1.traj.json", run))
    assert (failed.task_id, failed.reward, failed.stop_reason) == ("django-1", None, StopReason.FAILED)
    assert failed.failure is not None and (failed.failure.error, failed.failure.message) == ("ConnectionError", "gone")


# ---------------------------------------------------------------- who a user is

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "Fix it"},
    {"role": "assistant", "content": "THOUGHT: look\n\n```mswea_bash_command\nls\n```"},
    {"role": "user", "content": "<returncode>0</returncode>\n<output>\na.py\n</output>"},
    {"role": "assistant", "content": "THOUGHT: done\n\n```mswea_bash_command\ntrue\n```"},
]
PEOPLE = [
    [GO, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Thanks. And 2 + 2?"}],
    [GO, {"role": "assistant", "content": "Try:\n```python\nx = 1\n```\nIt is 1."}, {"role": "user", "content": "No."}],
    [GO, {"role": "assistant", "content": "", "tool_calls": [ASK]}, {"role": "tool", "content": "a"},
     {"role": "assistant", "content": "a"}, {"role": "user", "content": "Output: which?"}],
]  # fmt: skip
WORLDS = [
    ("Action: look", "You are in a room."),
    ("I look.\n```bash\nls\n```", "a.py"),
    ('{"commands": [{"keystrokes": "ls\\n"}]}', "a.py"),
    ("<tool_call>\n{}\n</tool_call>", "a.py"),
    ("ls", "Observation: a.py"),
    ("ls", "<output>\na.py\n</output>"),
]


def test_an_environment_that_answers_as_a_user_is_recognised(tmp_path: Path) -> None:
    trajectory = one(written(tmp_path / "x.json", {"messages": TALK}))
    assert (said(trajectory, ENV), said(trajectory, CONTEXT)) == ("a.py\n", "")
    assert trajectory.stats["observed_users"] == 1
    for action, answer in WORLDS:
        talk = [GO, {"role": "assistant", "content": action}, {"role": "user", "content": answer}]
        assert said(one(written(tmp_path / "y.json", talk)), CONTEXT) == "", action
    for talk in PEOPLE:
        trajectory = one(written(tmp_path / "z.json", talk))
        assert said(trajectory, CONTEXT) == talk[-1]["content"]
        assert trajectory.stats["user_messages"] == 1


def test_a_file_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.json", {"messages": TALK})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["import", str(path)])
    assert done.exit_code == 0, done.output
    assert read_trajectories(tmp_path / "imported.parquet")[0].count(ENV) > 0
    done = CliRunner().invoke(app, ["account", str(path)])
    assert done.exit_code == 0, done.output


def test_the_note_and_the_option(tmp_path: Path) -> None:
    path, out = written(tmp_path / "x.json", {"messages": TALK}), tmp_path / "o.jsonl"

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    note = "taken for ENV_OUTPUT as they answer actions or read like output: 1"
    assert note in run("import", str(path), "--model", "base", "--out", str(out))
    assert read_trajectories(out)[0].count(ENV) > 0
    assert note in run("account", str(path), "--tokenizer", "characters")
    kept = "user messages after a first turn, taken for CONTEXT: 1"
    assert kept in run("import", str(path), "--model", "base", "--out", str(out), "--user-role", "context")
    assert read_trajectories(out)[0].count(ENV) == 0
    assert kept in run("account", str(path), "--tokenizer", "characters", "--user-role", "context")


# ---------------------------------------------------------------- SWE-agent


def swe_agent(**fields: Any) -> dict[str, Any]:
    history = [
        {"role": "system", "content": "s", "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": "look at this", "is_demo": True, "agent": "main"},
        {"role": "user", "content": "ISSUE", "agent": "main"},
        {"role": "assistant", "content": "look\n```\nls\n```", "action": "ls", "message_type": "action"},
        {"role": "user", "content": "a.py\n(Open file: n/a)\n(Current directory: /r)\nbash-$",
         "message_type": "observation"},
        {"role": "assistant", "content": "", "tool_calls": [ASK], "message_type": "action"},
        {"role": "tool", "content": [{"type": "text", "text": "OBSERVATION:\nb.py"}], "tool_call_ids": ["c"],
         "message_type": "observation"},
    ]  # fmt: skip
    return {"environment": "main", "trajectory": [], "history": history, "info": {"exit_status": "submitted"}, **fields}


def test_swe_agent(tmp_path: Path) -> None:
    trajectory = one(written(tmp_path / "astropy-7.traj", swe_agent()))
    assert said(trajectory, ENV) == "a.pyb.py"
    assert said(trajectory, WARNING) == "\n(Open file: n/a)\n(Current directory: /r)\nbash-$OBSERVATION:\n"
    assert (trajectory.task_id, trajectory.reward, trajectory.num_turns) == ("astropy-7", None, 2)
    assert {s.tool for s in trajectory.segments if s.role is ENV} == {None, "bash"}
    steps = [{"action": "ls", "observation": "a.py\n", "response": "ls", "thought": "", "state": {}, "query": [GO]}]
    bare = one(written(tmp_path / "astropy-7.traj", {"environment": "main", "trajectory": steps, "info": {}}))
    assert (said(bare, ENV), said(bare, ACTION)) == ("a.py\n", "ls")


@pytest.mark.parametrize(
    ("status", "stop"),
    [("submitted (exit_cost)", "submitted"), ("exit_context", "max_tokens"), ("exit_format", "env_done"),
     ("exit_total_execution_time", "deadline"), ("exit_environment_error", "failed")],
)  # fmt: skip
def test_how_swe_agent_ended(tmp_path: Path, status: str, stop: str) -> None:
    path = written(tmp_path / "a.traj", swe_agent(info={"exit_status": status}))
    assert one(path).stop_reason.value == stop


# ---------------------------------------------------------------- inspect_ai


def sample(identifier: Any, scores: Any, **fields: Any) -> dict[str, Any]:
    messages = [
        {**GO, "source": "input"},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "I look."}],
            "tool_calls": [{"id": "c", "function": "bash", "arguments": {"cmd": "ls"}, "type": "function"}],
        },
        {"role": "tool", "content": "attachment://0a1b", "tool_call_id": "c", "function": "bash"},
    ]
    return {"id": identifier, "epoch": 1, "input": "Go", "messages": messages, "scores": scores,
            "attachments": {"0a1b": "a.txt\n"}, **fields}  # fmt: skip


def eval_log(samples: list[Any]) -> dict[str, Any]:
    return {"version": 2, "status": "success", "eval": {"task": "files"}, "plan": {}, "samples": samples}


SAMPLES = [
    sample(1, {"includes": {"value": "C"}}),
    sample(1, {"includes": {"value": "I"}}, epoch=2),
    sample("b", {"f1": {"value": 0.25}, "other": {"value": True}}, limit={"type": "token", "limit": 9}),
    sample("c", {"f1": {"value": 1}}, error={"message": "sandbox gone", "traceback": "t"}),
]
SCORED = [
    ("files/1", 0, 1.0, "submitted"),
    ("files/1", 1, 0.0, "submitted"),
    ("files/b", 0, 0.25, "max_tokens"),
    ("files/c", 0, None, "failed"),
]


def test_a_log_of_inspect(tmp_path: Path) -> None:
    found = in_characters(written(tmp_path / "log.json", eval_log([*SAMPLES, sample("d", {"x": {"value": "good"}})])))
    assert [(t.task_id, t.sample_index, t.reward, t.stop_reason.value) for t in found.trajectories] == SCORED
    assert [said(t, ENV) for t in found.trajectories] == ["a.txt\n"] * 4
    assert found.trajectories[2].stats["score_other"] == 1
    (refused,) = found.refusals
    assert refused.where.endswith("log.json, rollout 4") and "score 'x' is 'good'" in refused.reason
    assert one(written(tmp_path / "one.json", SAMPLES[0])).reward == 1
    answer = {"role": "tool", "content": "a.txt", "tool_call_id": "c", "function": "bash"}
    bare = {"messages": [*SAMPLES[0]["messages"][:2], answer]}
    assert one(written(tmp_path / "bare.json", bare)).reward is None


@pytest.mark.parametrize("zstd", [True, False])
def test_an_eval_file_of_inspect(tmp_path: Path, zstd: bool) -> None:
    path = tmp_path / "log.eval"
    entries = {f"samples/{s['id']}_epoch_{s['epoch']}.json": s for s in SAMPLES}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if zstd else zipfile.ZIP_DEFLATED) as archive:
        for name, entry in {"header.json": eval_log([]), **entries, "summaries.json": []}.items():
            content = json.dumps(entry).encode()
            if not zstd:
                archive.writestr(name, content)
                continue
            archive.writestr(name, pa.compress(content, "zstd", asbytes=True))  # method 93, which newer logs have
            archive.filelist[-1].compress_type, archive.filelist[-1].file_size = 93, len(content)
    found = in_characters(path)
    assert not found.refusals
    assert [(t.task_id, t.sample_index, t.reward, t.stop_reason.value) for t in found.trajectories] == SCORED
    written(path, "no zip")
    assert "is no .eval file" in str(
        CliRunner().invoke(app, ["account", str(path), "--tokenizer", "characters"]).exception
    )


# ---------------------------------------------------------------- verifiers' results

RESULT: dict[str, Any] = {
    "example_id": 3,
    "task": "files",
    "prompt": [GO],
    "completion": [
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(ASK), json.dumps({**ASK, "id": "d"})]},
        {"role": "tool", "content": "a.txt", "tool_calls": None},
        {"role": "tool", "content": "b.txt"},
        {"role": "assistant", "content": "a.txt", "tool_calls": None},
    ],
    "reward": 1.0,
    "answer": "a.txt",
}


def test_results_of_verifiers(tmp_path: Path) -> None:
    lines = [RESULT, {**RESULT, "reward": 0.0, "error": {"error": "SandboxError", "error_chain_str": "gone"}}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**RESULT, "is_truncated": True}]))
    first, broken, cut = in_characters(path).trajectories
    assert (first.task_id, first.reward, said(first, ENV), first.num_turns) == ("files/3", 1.0, "a.txtb.txt", 2)
    assert {s.tool for s in first.segments if s.role is ENV} == {"bash"}
    assert (broken.reward, broken.stop_reason, broken.sample_index) == (None, StopReason.FAILED, 1)
    assert cut.stop_reason is StopReason.MAX_TOKENS
    plain = {"example_id": 0, "prompt": "1 + 1 =", "completion": " 2", "reward": 1.0}
    assert said(one(written(tmp_path / "results.jsonl", plain)), ACTION) == " 2"


# ---------------------------------------------------------------- OpenHands

OLD_EVENTS: list[dict[str, Any]] = [
    {"id": 0, "source": "agent", "action": "system", "args": {"content": "s", "tools": []}},
    {"id": 1, "source": "user", "action": "message", "args": {"content": "Fix it"}},
    {"id": 2, "source": "environment", "observation": "agent_state_changed", "content": "", "extras": {}},
    {"id": 3, "source": "agent", "action": "run", "args": {"command": "ls", "thought": "I look.", "is_input": False},
     "tool_call_metadata": {"function_name": "execute_bash", "tool_call_id": "c", "total_calls_in_response": 1}},
    {"id": 4, "source": "agent", "observation": "run", "content": "a.py", "extras": {"command": "ls"}, "cause": 3,
     "tool_call_metadata": {"function_name": "execute_bash", "tool_call_id": "c"}},
    {"id": 5, "source": "agent", "action": "think", "args": {"thought": "hm"}},
    {"id": 6, "source": "agent", "observation": "error", "content": "no such tool", "extras": {}},
    {"id": 7, "source": "agent", "action": "finish", "args": {"final_thought": "done"}},
]  # fmt: skip
NEW_EVENTS: list[dict[str, Any]] = [
    {"kind": "SystemPromptEvent", "source": "agent", "system_prompt": {"type": "text", "text": "s"}, "tools": []},
    {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": [{"text": "Fix it"}]}},
    {"kind": "ConversationStateUpdateEvent", "source": "environment", "key": "x", "value": 1},
    {"kind": "ActionEvent", "source": "agent", "thought": [{"type": "text", "text": "I look."}],
     "tool_name": "execute_bash", "tool_call_id": "c",
     "tool_call": {"id": "c", "name": "execute_bash", "arguments": '{"command": "ls"}'}},
    {"kind": "ObservationEvent", "source": "environment", "tool_name": "execute_bash", "tool_call_id": "c",
     "observation": {"kind": "ExecuteBashObservation", "content": [{"type": "text", "text": "a.py"}]}},
    {"kind": "ActionEvent", "source": "agent", "thought": [], "tool_name": "think",
     "action": {"kind": "T", "thought": "x", "n": 1}},
    {"kind": "AgentErrorEvent", "source": "agent", "error": "no such tool", "tool_name": "think"},
    {"kind": "MessageEvent", "source": "agent", "llm_message": {"role": "assistant", "content": [{"text": "done"}]}},
]  # fmt: skip


@pytest.mark.parametrize("events", [OLD_EVENTS, NEW_EVENTS])
def test_events_of_openhands(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    for path in (
        written(tmp_path / "events.json", events),
        written(tmp_path / "events.jsonl", "\n".join(map(json.dumps, events))),
    ):
        trajectory = one(path)
        assert (said(trajectory, ENV), said(trajectory, WARNING)) == ("a.py", "no such tool")
        assert (trajectory.num_turns, said(trajectory, CONTEXT)) == (3, "")
        assert said(trajectory, ACTION).startswith(
            'I look.<tool_call>\n{"arguments": {"command": "ls"}, "name": "execute_bash"}\n</tool_call>\n'
        )
    report = {"instance_id": "astropy-7", "history": events, "test_result": {"report": {"resolved": True}}}
    solved = one(written(tmp_path / "output.jsonl", report))
    assert (solved.task_id, solved.reward) == ("astropy-7", 1.0)
    broken = one(written(tmp_path / "output.jsonl", {**report, "error": "the runtime died"}))
    assert (broken.reward, broken.stop_reason) == (None, StopReason.FAILED)


# ---------------------------------------------------------------- SkyRL and rLLM


def test_a_batch_of_skyrl_keeps_masks_and_logprobs(tmp_path: Path) -> None:
    batch = {
        "prompt_token_ids": [[1, 2], [1, 2]],
        "response_ids": [[3, 4, 5, 6], [3, 7]],
        "rewards": [[0.0, 0.0, 0.0, 1.0], 0.0],
        "loss_masks": [[1, 0, 0, 1], [1, 1]],
        "rollout_logprobs": [[-0.5, 0.0, 0.0, -0.25], [-0.5, -1.0]],
        "stop_reasons": ["stop", "length"],
        "trajectory_ids": [{"instance_id": "t_0"}, {"instance_id": "t_1"}],
    }
    path = written(tmp_path / "batch.json", batch)
    assert guess_format(batch) == "skyrl"
    first, second = import_files([path], None, None, Observations(role=ENV)).trajectories
    assert [(s.role, s.token_ids, s.logprobs) for s in first.segments] == [
        (CONTEXT, (1, 2), None),
        (ACTION, (3,), (-0.5,)),
        (ENV, (4, 5), None),
        (ACTION, (6,), (-0.25,)),
    ]
    assert (first.reward, second.reward, second.token_ids) == (1.0, 0.0, (1, 2, 3, 7))
    text = {"input_prompt": "p", "output_response": "r", "score": 1.0, "stop_reason": "stop"}
    assert "loss_masks" in import_files([written(tmp_path / "dump.jsonl", text)]).refusals[0].reason


def test_an_episode_of_rllm_is_its_trajectories(tmp_path: Path) -> None:
    step = {"prompt_ids": [1], "response_ids": [2], "logprobs": [-1.0], "chat_completions": [], "reward": 0.0}
    then = {**step, "prompt_ids": [1, 2, 3], "response_ids": [4], "logprobs": []}
    told = {
        **step,
        "prompt_ids": [],
        "response_ids": [],
        "chat_completions": [GO, {"role": "assistant", "content": "a"}],
    }
    episode = {
        "id": "gsm:0",
        "task": {"question": "q"},
        "trajectories": [
            {"uid": "u", "name": "solver", "task": None, "steps": [step, then], "reward": 1.0},
            {"uid": "v", "name": "judge", "task": None, "steps": [told], "reward": None},
            {"uid": "w", "name": "empty", "steps": [{**step, "response_ids": []}], "reward": 0.0},
        ],
    }
    assert len(rows_of({"trajectories": episode["trajectories"][:2]}, "rllm")) == 2
    path = written(tmp_path / "episode.json", {**episode, "trajectories": episode["trajectories"][:2]})
    renderer = Renderer(tiny_tokenizer(), [], RendererConfig())
    first, second = import_files([path], None, renderer.for_tools, Observations(role=ENV)).trajectories
    assert (first.task_id, first.reward, first.token_ids) == ("gsm", 1.0, (1, 2, 3, 4))
    assert [s.logprobs for s in first.segments if s.role is ACTION] == [(-1.0,), None]
    assert (second.reward, second.num_turns) == (None, 1)
    refused = import_files([written(path, episode)]).refusals
    assert "trajectory 2 has neither response_ids nor chat_completions" in refused[0].reason


# ---------------------------------------------------------------- Harbor's folders


def trial(folder: Path, name: str, result: dict[str, Any], written_reward: str | None = None) -> None:
    step = {
        "step_id": 2, "source": "agent", "message": "ok",
        "tool_calls": [{"tool_call_id": "c", "function_name": "bash_command", "arguments": {"keystrokes": "ls\n"}}],
        "observation": {"results": [{"content": "New Terminal Output:\n\nroot@a1b2:/# ls\na.txt\nroot@a1b2:/#\n\n\n"}]},
    }  # fmt: skip
    steps = [{"step_id": 1, "source": "user", "message": "Do it"}, step]
    document = {"schema_version": "ATIF-v1.6", "session_id": "s", "agent": {"name": "terminus-2"}, "steps": steps}
    written(folder / name / "agent" / "trajectory.json", document)
    written(folder / name / "result.json", {"trial_name": name, **result})
    if written_reward is not None:
        written(folder / name / "verifier" / "reward.txt", written_reward)


def test_a_job_of_harbor_is_groups_of_trials(tmp_path: Path) -> None:
    job = tmp_path / "job"
    written(job / "result.json", {"id": "j", "n_total_trials": 6, "stats": {}})
    raised = {"exception_type": "AgentTimeoutError", "exception_message": "900 s", "exception_traceback": "t"}
    trial(job, "count__a", {"task_name": "count", "verifier_result": {"rewards": {"reward": 1.0}}})
    trial(job, "count__b", {"task_name": "count", "verifier_result": None}, "0.5\n")
    trial(
        job, "count__c", {"task_name": "count", "verifier_result": {"rewards": {"reward": 0}}, "exception_info": raised}
    )
    trial(
        job, "sort__d", {"task_name": "sort", "exception_info": {**raised, "exception_type": "RewardFileNotFoundError"}}
    )
    trial(job, "sort__e", {"task_name": "sort", "verifier_result": {"rewards": {"reward": 1, "speed": 0.3}}})
    trial(job, "sort__f", {"task_name": "sort"}, "yes\n")
    (job / "sort__g").mkdir()
    written(job / "sort__g" / "result.json", {"trial_name": "sort__g", "task_name": "sort", "exception_info": raised})
    found = in_characters(job)
    assert [(t.task_id, t.sample_index, t.reward, t.stop_reason.value) for t in found.trajectories] == [
        ("count", 0, 1.0, "submitted"),
        ("count", 1, 0.5, "submitted"),
        ("count", 2, 0.0, "deadline"),
        ("sort", 0, None, "failed"),
        ("sort", 1, 1.0, "submitted"),
    ]
    assert {said(t, ENV) for t in found.trajectories} == {"a.txt\n"}
    failed, scored = found.trajectories[3:]
    assert failed.failure is not None and (failed.failure.phase, failed.failure.error) == (
        "score",
        "RewardFileNotFoundError",
    )
    assert scored.stats["reward_speed"] == 0.3
    assert ["'yes'" in found.refusals[0].reason, "AgentTimeoutError" in found.refusals[1].reason] == [True, True]
    assert one(job / "count__b" / "result.json").reward == 0.5
    done = CliRunner().invoke(app, ["account", str(tmp_path / "job" / "count__a"), "--tokenizer", "characters"])
    assert done.exit_code == 0, done.output


# ---------------------------------------------------------------- spellings of messages

ASSISTANTS: dict[str, list[dict[str, Any]]] = {
    "a call with arguments as an object": [{"role": "assistant", "tool_calls": [
        {**ASK, "function": {"name": "bash", "arguments": {"cmd": "ls"}}}]}],
    "a function_call": [{"role": "assistant", "content": None, "function_call": ASK["function"]}],
    "a call of inspect": [{"role": "assistant", "tool_calls": [
        {"id": "c", "function": "bash", "arguments": {"cmd": "ls"}}]}],
    "calls as JSON text": [{"role": "assistant", "tool_calls": json.dumps([ASK])}],
    "a call as JSON text": [{"role": "assistant", "tool_calls": [json.dumps(ASK)]}],
    "a tool_use": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "c", "name": "bash", "input": {"cmd": "ls"}}]}],
    "an item": [{"type": "function_call", "call_id": "c", "name": "bash", "arguments": '{"cmd": "ls"}'}],
    "from and value": [{"from": "function_call", "value": '{"name": "bash", "arguments": {"cmd": "ls"}}'}],
    "filled in with nulls": [{"role": "assistant", "content": None, "function_call": None, "reasoning": None,
                              "tool_calls": [{**ASK, "index": None}]}],
}  # fmt: skip
ANSWERS: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": "c", "content": "a"},
    {"role": "tool", "content": [{"type": "text", "text": "a"}]},
    {"role": "function", "name": "bash", "content": "a"},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "a"}]}]},
    {"type": "function_call_output", "call_id": "c", "output": "a"},
    {"from": "observation", "value": "a"},
]  # fmt: skip


@pytest.mark.parametrize("name", ASSISTANTS)
def test_every_spelling_of_a_call_and_its_answer_is_the_same_call(name: str) -> None:
    for answer in ANSWERS:
        _, agent, tool = chat_messages([{"from": "human", "value": "Go"}, *ASSISTANTS[name], answer])
        assert (agent.role, agent.calls, tool.role, tool.text, tool.tool) == ("assistant", (LS,), "tool", "a", "bash")


def test_items_of_one_reply_are_one_message() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        *ASSISTANTS["an item"],
        {**ASSISTANTS["an item"][0], "call_id": "d"},
        {"type": "function_call_output", "call_id": "d", "output": "b"},
    ]
    _, agent, tool = chat_messages(items)
    assert (agent.text, agent.reasoning, agent.calls, tool.tool) == ("I look.", "hm", (LS, LS), "bash")


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "a", "reasoning_content": "hm"},
        {"content": "a", "reasoning": "hm"},
        {"content": "a", "thinking": "hm"},
        {"content": "a", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        {"content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"content": "a", "provider_specific_fields": {"reasoning_content": "hm"}},
        {"content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a", "image_url": None}]},
    ],
)
def test_reasoning_is_found_in_any_of_its_fields(fields: dict[str, Any]) -> None:
    (message,) = chat_messages([{"role": "assistant", **fields}])
    assert (message.text, message.reasoning) == ("a", "hm")


def test_an_error_names_file_record_message_and_call(tmp_path: Path) -> None:
    bad = {**ASK, "function": {"name": "bash", "arguments": "{"}}
    talk = [GO, {"role": "assistant", "tool_calls": [ASK, bad]}]
    path = written(tmp_path / "x.jsonl", json.dumps({"messages": [GO]}) + "\n" + json.dumps({"messages": talk}))
    first, second = in_characters(path).refusals
    assert first.where == f"{path}:1"
    assert second.where == f"{path}:2" and second.reason.startswith(
        "call 1 of message 1 has arguments that are not JSON"
    )
    pq.write_table(pa.Table.from_pylist([{"messages": json.dumps(talk)}]), tmp_path / "x.parquet")
    (third,) = in_characters(tmp_path / "x.parquet").refusals
    assert third.where == f"{tmp_path / 'x.parquet'}[0]" and third.reason == second.reason

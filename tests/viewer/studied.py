"""A finished study of five arms and five seeds, and a folder of others' trajectories, written by the real writers."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recorded import BASE, A, B, encode, write_step

from backtalk.evidence.arms import read_arms
from backtalk.evidence.study import Study, run_study
from backtalk.exchange.write.atif import to_atif
from backtalk.exchange.write.inspect_ai import to_inspect
from backtalk.exchange.write.openenv import to_episode_record, to_training_trace
from backtalk.run.config import config_to_dict
from backtalk.run.estimates import Interval
from backtalk.run.evaluate import Evaluation, RecordedResult, TaskResult
from backtalk.run.log import RunLog
from backtalk.run.world_model import Example, Knowledge, TaskKnowledge

ARMS = ("grpo", "echo", "shuffled", "action_masked", "matched")
SEEDS = range(5)
STEPS = 2


def write_study(folder: Path) -> Path:
    """Write runs that have finished, and compare them: held-out pass@1 is 1/4 before, and after 1/2 in every arm.

    The policies of all arms but the first tell the answer of a command from another's, by half a nat a token.
    """
    settings = {"steps": STEPS, "evaluation.tasks": 2, "evaluation.world_model": True}
    study = Study(name="five", base="triage", arms=read_arms([*ARMS], "five"), seeds=tuple(SEEDS), settings=settings)
    for arm in ARMS:
        for seed in SEEDS:
            log = RunLog(folder / f"{arm}_seed{seed}")
            log.write_config(config_to_dict(study.config(arm, seed)))
            log.tokenizer_path.mkdir()
            shutil.copy(BASE, log.tokenizer_path)
            write_step(log, STEPS - 1)
            for step in range(STEPS):
                spent = {"rollouts": 4, "rollout_seconds": 1.0, "tokens_per_second": 100.0, "action_tokens": 10}
                log.write_metrics(step, {"reward": 0.25 * (step + 1), **spent})
            for step in (0, STEPS):
                log.write_evaluation(step, evaluation(step).to_dict(), [A])
                knows = step > 0 and arm != ARMS[0]
                log.write_world_model(
                    step, {"format": 1, "step": step, "sets": {"recorded": knowledge(knows), "own": None}}
                )
    with ThreadPoolExecutor() as threads:  # in the main thread the browser's loop may be going on
        threads.submit(asyncio.run, run_study(study, folder)).result()
    return folder


def evaluation(step: int) -> Evaluation:
    """Return a policy's results on two tasks of four rollouts each."""
    solved = 2 if step else 1
    tasks = tuple(TaskResult(name, 4, 4, solved, float(solved), 20.0 - step, 10) for name in "ab")
    estimate = Interval(solved / 4, 0.1, 0.9)
    return Evaluation(
        step=step,
        samples_per_task=4,
        pass_at_1=estimate,
        pass_at_k=None,
        reward=estimate,
        env_ce_recorded=None,
        env_ce_own=Interval(2.0 - step / 10),
        per_rollout={},
        stop_reasons={},
        no_reward=0,
        seconds=1.0,
        tasks=tasks,
        recorded=tuple(RecordedResult(task_id=name, env_nats=20.0, env_tokens=10) for name in "ab"),
    )


def knowledge(knows: bool) -> dict[str, object]:
    """Return what was measured of a policy that tells both of two answers from another command's, or neither."""
    found = Knowledge(2, {name: TaskKnowledge(name, 20.0, 10, 40, 5, 1, int(knows)) for name in "ab"})
    other = 1.5 if knows else 0.5
    written = "total 12" if knows else "no idea"
    for name in "ab":
        found.examples[name] = Example(name, f"{name}/0/0", "ls <b>", "total 12", 1.0, "notes.txt", other, written)
    return found.to_dict()


def write_foreign(folder: Path) -> Path:
    """Write what Harbor, Inspect, TRL, verifiers and OpenEnv write, and a chat."""
    folder.mkdir(parents=True)
    rollouts = [*A, *B]
    (folder / "harbor.jsonl").write_text("".join(json.dumps(to_atif(t, model_name="base")) + "\n" for t in rollouts))
    (folder / "inspect.json").write_text(json.dumps(to_inspect(rollouts, task="count", model_name="base")))
    trl = {"prompt_ids": [[1, 2]], "completion_ids": [[3, 4]], "logprobs": [[-0.5, -1.0]], "rewards": [0.5]}
    (folder / "trl.json").write_text(json.dumps(trl))
    said = A.trajectories[0].messages
    chat = [{**m, "role": "user" if m["role"] == "tool" else m["role"]} for m in said]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    write_verifiers(folder)
    (folder / "episode.json").write_text(json.dumps(to_episode_record(A.trajectories[0])))
    (folder / "training_trace.json").write_text(json.dumps(to_training_trace(A.trajectories[0])))
    return folder


def write_verifiers(folder: Path) -> None:
    """Write a trace of token ids, and a row of results with messages, as verifiers does."""
    asked, action, output = map(encode, ("count the lines", "<bash>ls</bash>", "total 12\n"))

    def node(parent: int | None, role: str, ids: tuple[int, ...], **fields: object) -> dict[str, object]:
        return {"parent": parent, "message": {"role": role, "content": ""}, "token_ids": ids, **fields}

    nodes = [
        node(None, "user", asked, mask=[False] * len(asked), is_content=[True] * len(asked)),
        node(0, "assistant", action, sampled=True, mask=[True] * len(action), logprobs=[-0.5] * len(action)),
        node(1, "tool", output, mask=[False] * len(output), is_content=[True] * len(output)),
    ]
    trace = {"nodes": nodes, "rewards": {"a": {"score": 1.0}}, "ok": True}
    (folder / "traces.jsonl").write_text(json.dumps(trace) + "\n")
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": json.dumps({"command": "ls"})}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(call)]},
        {"role": "tool", "content": "total 12\n"},
        {"role": "assistant", "content": "12", "tool_calls": None},
    ]
    row = {"example_id": 3, "task": "files", "prompt": [{"role": "user", "content": "count the lines"}]}
    (folder / "results.jsonl").write_text(json.dumps({**row, "completion": said, "reward": 1.0}) + "\n")

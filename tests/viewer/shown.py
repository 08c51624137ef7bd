"""A run folder with all that a viewer has to show: roles, weights of a real objective, a failure, hostile text."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import build_samples
from backtalk.objective.weights import step_weights
from backtalk.run.estimates import Interval
from backtalk.run.evaluate import Evaluation
from backtalk.run.log import RunLog
from backtalk.settings import to_plain
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
HOSTILE = "\x1b]0;owned\x07<script>alert(1)</script> ünï☃"


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def rollout(task: str, index: int, reward: float | None, said: str, *, failed: bool = False) -> Trajectory:
    action = encode("<bash>ls</bash><|im_end|>")
    segments = [
        Segment(TokenRole.TEMPLATE, encode("<|im_start|>user\n")),
        Segment(TokenRole.CONTEXT, encode("count the lines")),
        Segment(TokenRole.TEMPLATE, encode("<|im_end|>\n<|im_start|>assistant\n")),
        Segment(TokenRole.ACTION, action, (-0.5,) * len(action), 0),
        Segment(TokenRole.TEMPLATE, encode("\n<|im_start|>tool\n"), None, 0, "bash"),
        Segment(TokenRole.ENV_OUTPUT, encode(said), None, 0, "bash"),
        Segment(TokenRole.WARNING, encode("[exit code 1]"), None, 0, "bash"),
        Segment(TokenRole.TEMPLATE, encode("<|im_end|>\n"), None, 0, "bash"),
    ]
    messages = (
        {"role": "user", "content": "count the lines"},
        {"role": "assistant", "content": "<bash>ls</bash>"},
        {"role": "tool", "content": f"{said}[exit code 1]", "tool": "bash"},
    )
    return Trajectory(
        task_id=task,
        sample_index=index,
        segments=tuple(segment for segment in segments if len(segment)),
        messages=messages,
        reward=reward,
        stop_reason=StopReason.FAILED if failed else StopReason.SUBMITTED,
        failure=Failure("score", "VerifierError", "no reward") if failed else None,
        stats={"invalid_calls": float(index)},
    )


GROUPS = [
    TrajectoryGroup("a", (rollout("a", 0, 1.0, "total 12"), rollout("a", 1, 0.0, HOSTILE))),
    TrajectoryGroup("b", (rollout("b", 0, 0.5, ""), rollout("b", 1, None, "total 3 notes.txt", failed=True))),
]


def train_on(log: RunLog, step: int, groups: list[TrajectoryGroup]) -> None:
    """Write a step's groups and the weights that the objective gives their tokens."""
    log.write_groups(step, groups)
    samples = [sample for group in groups for sample in build_samples(group)]
    log.write_weights(step, groups, step_weights(samples, ObjectiveConfig()))


def write_run(folder: Path, *, coeff: float = 0.05, steps: int = 2) -> Path:
    """Write a run of some steps with one evaluation."""
    log = RunLog(folder)
    objective = to_plain(ObjectiveConfig()) | {"world_model_coeff": coeff}
    log.write_config(
        {
            "steps": 2,
            "engine": {"model": "base"},
            "tasks": {"source": "triage"},
            "rollout": {"max_tokens": 100},
            "objective": objective,
        }
    )
    TOKENIZER.save_pretrained(str(log.tokenizer_path))
    for step in range(steps):
        train_on(log, step, GROUPS)
        log.write_metrics(
            step,
            {
                "reward": 0.5,
                "rollouts": 4,
                "env_output_ce": 2.0 - step,
                "grad_norm": 1.0,
                "action_tokens": 9,
                "env_output_tokens": 20,
                "rollout_seconds": 1.5,
                "train_seconds": 0.5,
            },
        )
    evaluation = Evaluation(
        step=0,
        samples_per_task=2,
        pass_at_1=Interval(0.25, 0.1, 0.4),
        pass_at_k=None,
        reward=Interval(0.25),
        env_ce_recorded=None,
        env_ce_own=Interval(2.5, 2.4, 2.6),
        per_rollout={"num_turns": 3.0},
        stop_reasons={"submitted": 4},
        no_reward=1,
        seconds=1.0,
        tasks=(),
        recorded=(),
    )
    log.write_evaluation(0, evaluation.to_dict(), GROUPS[:1])
    return log.folder


def read_page(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the answers that a page of one file holds: about all it shows, and by the key of each rollout inside."""
    found = re.search(r'<script type="application/json" id="frozen">(.*)</script>', path.read_text())
    assert found
    frozen = json.loads(found[1])
    index, *rollouts = (
        json.loads(gzip.decompress(base64.b64decode(text))) for text in (frozen["index"], *frozen["rollouts"].values())
    )
    return index, dict(zip(frozen["rollouts"], rollouts, strict=True))

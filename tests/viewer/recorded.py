"""A run folder with numbers chosen by hand, hostile text, a failure and two groups; it needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from backtalk.run.log import RunLog
from backtalk.run.log.scores import add_scores
from backtalk.trajectory import (
    Failure,
    Segment,
    StopReason,
    TokenRole,
    TokenScores,
    TokenWeights,
    Trajectory,
    TrajectoryGroup,
)

BASE = Path(str(resources.files("backtalk"))) / "assets" / "base_model" / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(BASE))
TRACEBACK = 'File "shell.py", line 7, in step <i>'
HOSTILE = "\x1b[31mred\x1b[0m <script>alert(1)</script> \u202eevil\u202c\n"
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)


def rollout(task: str, index: int, reward: float | None, said: str, turns: int = 1, failed: bool = False) -> Trajectory:
    segments = [
        Segment(TokenRole.TEMPLATE, encode(HEAD)),
        Segment(TokenRole.CONTEXT, encode("count the lines")),
        Segment(TokenRole.TEMPLATE, encode(TAIL)),
    ]
    messages = [{"role": "user", "content": "count the lines"}]
    for turn in range(turns):
        action = encode("<bash>ls</bash><|im_end|>")
        segments += [
            Segment(TokenRole.ACTION, action, tuple(-0.25 * i for i in range(len(action))), turn),
            Segment(TokenRole.TEMPLATE, encode("\n<|im_start|>tool\n"), None, turn, "bash"),
            Segment(TokenRole.ENV_OUTPUT, encode(said), None, turn, "bash"),
        ]
        messages += [{"role": "assistant", "content": "<bash>ls</bash>"}, {"role": "tool", "content": said}]
    return Trajectory(
        task_id=task,
        sample_index=index,
        segments=tuple(segments),
        messages=tuple(messages),
        reward=reward,
        stop_reason=StopReason.FAILED if failed else StopReason.SUBMITTED,
        failure=Failure("step", "SandboxError", "bwrap <b>died</b>", TRACEBACK) if failed else None,
        stats={"invalid_calls": float(index)},
    )


A = TrajectoryGroup("a", (rollout("a", 0, 1.0, "total 12\n"), rollout("a", 1, 0.0, HOSTILE, turns=2)))
B = TrajectoryGroup("b", (rollout("b", 0, 0.5, "Notes.txt\n"), rollout("b", 1, None, "total 3\n", failed=True)))


def weigh(trajectory: Trajectory, advantage: float | None) -> TokenWeights:
    """Half the advantage on each action token, and 1/8 on each token of output: exact in the float32 of the file."""
    roles = trajectory.roles
    policy = tuple(0.5 * (advantage or 0.0) * (role is TokenRole.ACTION) for role in roles)
    return TokenWeights(advantage, policy, tuple(0.125 * (role is TokenRole.ENV_OUTPUT) for role in roles))


def leaking() -> tuple[Trajectory, TokenWeights]:
    """Return a rollout with two template tokens at its end marked as output, and a policy weight on its first token."""
    whole = A.trajectories[0]
    output = (*encode("total 12\n"), *encode("\n<|im_start|>"))
    segments = (*whole.segments[:5], Segment(TokenRole.ENV_OUTPUT, output, None, 0, "bash"))
    wrong = Trajectory(task_id="a", sample_index=0, segments=segments, messages=whole.messages, reward=1.0)
    weights = weigh(wrong, 1.0)
    return wrong, TokenWeights(1.0, (0.5, *weights.policy[1:]), weights.world)


def forked() -> Trajectory:
    """Return its sibling, whose history was rewritten once, so that it has a second branch."""
    again = (
        Segment(TokenRole.CONTEXT, encode("count the lines, ls"), branch=1),
        Segment(TokenRole.ENV_OUTPUT, encode("total 3"), None, 1, "bash", 1),
    )
    plain = A.trajectories[0]
    return replace(plain, sample_index=1, segments=(*plain.segments, *again))


def write_step(log: RunLog, step: int, *, trained: bool = True) -> None:
    log.write_groups(step, [A, B])
    if trained:
        weights = [weigh(t, a) for t, a in zip([*A, *B], (1.5, -1.5, 0.0, None), strict=True)]
        log.write_weights(step, [A, B], weights)


def score_step(log: RunLog, step: int) -> None:
    """Score a step twice: 2 nats each token before; after, 1, and 6 on the first of a rollout's output."""
    rollouts = [*A, *B]
    before = [TokenScores((-2.0,) * len(t)) for t in rollouts]
    after = []
    for t in rollouts:
        first = t.roles.index(TokenRole.ENV_OUTPUT)
        expected = {first: ((encode("ls")[0], -0.25), (encode("x")[0], -4.0))}
        after.append(TokenScores(tuple(-6.0 if i == first else -1.0 for i in range(len(t))), expected))
    for name, scores in (("before", before), ("after", after)):
        add_scores(log.scores_path(step), name, "base", rollouts, scores)


def write_run(folder: Path) -> Path:
    """Write two of three steps and an evaluation before them."""
    log = RunLog(folder)
    objective = {"policy_coeff": 1.0, "world_model_coeff": 0.05}
    log.write_config({"steps": 3, "engine": {"model": "base"}, "tasks": {"source": "triage"}, "objective": objective})
    log.tokenizer_path.mkdir()
    shutil.copy(BASE, log.tokenizer_path)
    for step in range(2):
        write_step(log, step)
        seconds = {"rollout_seconds": 1.5, "train_seconds": 0.5}
        tokens = {"action_tokens": 10, "env_output_tokens": 20, "warning_tokens": 2}
        shares = {"world_grad_share": 0.1 + 0.6 * step, "policy_grad_norm_weights": 1.0, "world_model_coeff": 0.05}
        log.write_metrics(step, {"reward": 0.5 + step, "ce": float("nan"), **seconds, **tokens, **shares})
    score_step(log, 1)
    estimate = {"value": 0.25, "low": 0.1, "high": 0.4}
    log.write_evaluation(0, {"step": 0, "samples_per_task": 2, "pass_at_1": estimate, "pass_at_k": None}, [A])
    return log.folder

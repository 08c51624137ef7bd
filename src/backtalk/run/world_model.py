"""Measure what a policy knows of its environment: how well it predicts what its commands are answered with.

Of given rollouts, recorded or its own: cross-entropy per token and per byte by role, tool and origin; accuracy and
calibration of the most probable token; whether the true answer is likelier than another command's; and what the policy
writes when it answers itself. `docs/studies.md` lists the keys of the file that ``to_dict`` fills.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from backtalk.engines.base import Engine
from backtalk.engines.metrics import copied_mask
from backtalk.language.renderer import Renderer
from backtalk.objective.samples import to_samples
from backtalk.rollout.sampler import Sampler, SamplingParams
from backtalk.run.calibration import BINS, Calibration
from backtalk.run.estimates import Interval, ratio_interval
from backtalk.trajectory import Segment, TokenRole, TokenScores, Trajectory

FORMAT = 1  # of the file
MAX_PREDICTED = 256  # tokens of one answer that the policy writes itself
MAX_EXAMPLES = 24  # of the probes, kept with their texts
MAX_CHARS = 2000  # of a text of an example
BODY = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)


@dataclass(slots=True)
class CrossEntropy:
    """Cross-entropy of some tokens, in nats; None per token or byte where there is none."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, nats: float, tokens: int, size: int) -> None:
        """Add some tokens and the bytes of their text."""
        self.nats, self.tokens, self.bytes = self.nats + nats, self.tokens + tokens, self.bytes + size

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        per_token = self.nats / self.tokens if self.tokens else None
        per_byte = self.nats / self.bytes if self.bytes else None
        return asdict(self) | {"ce_per_token": per_token, "ce_per_byte": per_byte}


@dataclass(slots=True)
class TaskKnowledge:
    """Sums over the rollouts of one task. ``correct`` is None where the engine tells no most probable token."""

    task_id: str
    nats: float = 0.0  # of environment output, as tokens, bytes and correct
    tokens: int = 0
    bytes: int = 0
    correct: int | None = None
    pairs: int = 0  # of a true answer and another command's
    preferred: int = 0  # pairs in which the true one has fewer nats a token
    margin: float = 0.0  # nats a token of the other less those of the true one, summed over pairs
    answers: int = 0  # written by the policy itself
    exact: int = 0  # of them, those with all lines right, in order
    lines: int = 0  # of the true answers, without blank ones
    predicted_lines: int = 0
    matched_lines: int = 0


@dataclass(slots=True)
class Example:
    """One answer that the two probes asked for, with its texts; cross-entropies are in nats a token."""

    task_id: str
    key: str  # the same at every step, and for every policy that is measured on the same rollouts
    command: str
    true: str
    true_ce: float
    other: str | None = None  # what another command was answered; None where the task has no such command
    other_ce: float | None = None
    written: str = ""  # by the policy, in place of the answer


@dataclass(slots=True)
class Knowledge:
    """Everything measured on one set of rollouts."""

    rollouts: int
    tasks: dict[str, TaskKnowledge]
    by_role: dict[str, CrossEntropy] = field(default_factory=lambda: defaultdict(CrossEntropy))
    by_tool: dict[str, CrossEntropy] = field(default_factory=lambda: defaultdict(CrossEntropy))  # environment output
    by_origin: dict[str, CrossEntropy] = field(default_factory=lambda: defaultdict(CrossEntropy))  # the same
    calibration: Calibration = field(default_factory=Calibration)
    examples: dict[str, Example] = field(default_factory=dict)  # by key

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as a world_model_step_*.json holds it for each set."""
        tasks = list(self.tasks.values())
        parts = {
            "ce_per_token": [(t.nats, t.tokens) for t in tasks],
            "ce_per_byte": [(t.nats, t.bytes) for t in tasks],
            "token_accuracy": [(t.correct, t.tokens) for t in tasks if t.correct is not None],
            "true_preferred": [(t.preferred, t.pairs) for t in tasks],
            "margin": [(t.margin, t.pairs) for t in tasks],
            "exact_answers": [(t.exact, t.answers) for t in tasks],
            "line_recall": [(t.matched_lines, t.lines) for t in tasks],
            "line_precision": [(t.matched_lines, t.predicted_lines) for t in tasks],
        }
        return {
            "rollouts": self.rollouts,
            "estimates": {name: _plain(ratio_interval(pairs)) for name, pairs in parts.items()},
            "by_role": {name: ce.to_dict() for name, ce in sorted(self.by_role.items())},
            "by_tool": {name: ce.to_dict() for name, ce in sorted(self.by_tool.items())},
            "by_origin": {name: ce.to_dict() for name, ce in sorted(self.by_origin.items())},
            "calibration": _calibration(self.calibration),
            "tasks": [asdict(task) for task in tasks],
            "examples": [asdict(example) for example in self.examples.values()],
        }


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)


def _calibration(found: Calibration) -> dict[str, Any] | None:
    if found.error is None:
        return None
    rows = [
        {"low": i / BINS, "high": (i + 1) / BINS, "tokens": tokens, "confidence": confidence, "accuracy": accuracy}
        for i, (tokens, confidence, accuracy) in enumerate(found.means())
    ]
    return {"ece": found.error, "bins": rows}


async def measure_world_model(
    engine: Engine, renderer: Renderer, sets: Mapping[str, Sequence[Trajectory]], *, step: int
) -> dict[str, Any]:
    """Measure the current policy on sets of rollouts, such as ``recorded`` and ``own``; return plain data.

    An empty set is None. Accuracy and calibration need an engine with ``score_tokens``. The two probes take one
    observation of each rollout, the same at every step, and leave out rollouts whose history was rewritten.
    """
    found = {
        name: (await _measure(engine, renderer, rollouts)).to_dict() if rollouts else None
        for name, rollouts in sets.items()
    }
    return {"format": FORMAT, "step": step, "sets": found}


async def _measure(engine: Engine, renderer: Renderer, rollouts: Sequence[Trajectory]) -> Knowledge:
    known = Knowledge(len(rollouts), {t.task_id: TaskKnowledge(t.task_id) for t in rollouts})
    if (score_tokens := getattr(engine, "score_tokens", None)) is not None:
        scored: list[TokenScores] = await score_tokens(list(rollouts), 1)
        for trajectory, found in zip(rollouts, scored, strict=True):
            _add_top_tokens(known, trajectory, found)
        scores: list[Sequence[float]] = [found.logprobs for found in scored]
    else:
        scores = [*await engine.score(list(rollouts))]
    for trajectory, logprobs in zip(rollouts, scores, strict=True):
        _add_cross_entropies(known, trajectory, logprobs, renderer)
    answers = [find_answers(trajectory, renderer) for trajectory in rollouts]
    probes = [(_chosen(found), logprobs) for found, logprobs in zip(answers, scores, strict=True) if found]
    for answer, logprobs in probes[:MAX_EXAMPLES]:
        command = renderer.encoder.decode(answer.action)[:MAX_CHARS]
        true_ce = _mean_nats(logprobs[answer.start : answer.start + len(answer.body)])
        known.examples[answer.key] = Example(answer.task_id, answer.key, command, answer.text[:MAX_CHARS], true_ce)
    await _add_counterfactuals(known, engine, probes, [answer for found in answers for answer in found])
    await _add_predictions(known, engine, renderer, [answer for answer, _ in probes])
    return known


def _add_cross_entropies(
    known: Knowledge, trajectory: Trajectory, logprobs: Sequence[float], renderer: Renderer
) -> None:
    """Add a rollout's cross-entropies by role, tool and origin; bytes are those of the text of a run of tokens."""
    ids, task = trajectory.token_ids, known.tasks[trajectory.task_id]
    copied = [x for sample in to_samples(trajectory) for x in copied_mask(sample).tolist()]

    def ce(start: int, end: int) -> tuple[float, int, int]:
        return -sum(logprobs[start:end]), end - start, len(renderer.encoder.decode(ids[start:end]).encode())

    for start, end, segment in trajectory.spans():
        if segment.turn is None or segment.role in (TokenRole.CONTEXT, TokenRole.ACTION) or start == end:
            continue
        known.by_role[segment.role.name.lower()].add(*ce(start, end))
        if segment.role is not TokenRole.ENV_OUTPUT:
            continue
        nats, tokens, size = ce(start, end)
        task.nats, task.tokens, task.bytes = task.nats + nats, task.tokens + tokens, task.bytes + size
        known.by_tool[segment.tool or ""].add(nats, tokens, size)
        for i, j in _runs(copied, start, end):
            known.by_origin["copied" if copied[i] else "new"].add(*ce(i, j))


def _runs(values: Sequence[bool], start: int, end: int) -> Iterable[tuple[int, int]]:
    """Yield the stretches of equal values from start to end."""
    edges = [start, *(i for i in range(start + 1, end) if values[i] != values[i - 1]), end]
    return pairwise(edges)


def _add_top_tokens(known: Knowledge, trajectory: Trajectory, scored: TokenScores) -> None:
    """Add whether the most probable token is the true one, and the confidence in it, of environment output."""
    task = known.tasks[trajectory.task_id]
    task.correct = task.correct or 0
    for position, role in enumerate(trajectory.roles):
        if role is TokenRole.ENV_OUTPUT:
            task.correct += known.calibration.add(scored, position)


# ---------------------------------------------------------------- answers of the environment, and what is asked of them


@dataclass(frozen=True, slots=True)
class Answer:
    """What the environment answered in one turn: the body of its first message, and the history up to it."""

    task_id: str
    key: str  # of the rollout
    action: tuple[int, ...]
    start: int  # of the body, in the rollout's tokens
    before: tuple[int, ...]  # the history, with the heading that the chat template writes
    body: tuple[int, ...]
    text: str  # of the body
    ending: str  # what the chat template writes after it, up to the end of the turn


def find_answers(trajectory: Trajectory, renderer: Renderer) -> list[Answer]:
    """Return the answers in a rollout that have any text; none where the history was rewritten."""
    if len(trajectory.branches) > 1:
        return []
    ids, decode = trajectory.token_ids, renderer.encoder.decode
    end_of_turn = decode([renderer.end_of_turn_id])
    actions = {action[0].turn: tuple(x for s in action for x in s.token_ids) for action in trajectory.actions}
    answers, turn, spans = [], None, list(trajectory.spans())
    for n, (start, end, segment) in enumerate(spans):
        if segment.role not in BODY or segment.turn == turn or start == end:
            continue
        turn = segment.turn
        last = next((k for k in range(n, len(spans)) if spans[k][2].role not in BODY), len(spans))
        body = ids[start : spans[last - 1][1]]
        after = decode(spans[last][2].token_ids) if last < len(spans) else ""
        key = f"{trajectory.task_id}/{trajectory.sample_index}/{turn}"
        ending = after.split(end_of_turn)[0].strip()
        action = actions.get(turn, ())
        answers.append(Answer(trajectory.task_id, key, action, start, ids[:start], body, decode(body), ending))
    return answers


def _chosen(answers: Sequence[Answer]) -> Answer:
    """Return the answer of a rollout that the probes ask for, always the same one."""
    return Random(answers[0].key).choice(answers)


def other_answer(answer: Answer, answers: Sequence[Answer]) -> Answer | None:
    """Return the answer to another command at the same task that is not in the history yet; None if there is none."""
    others = [
        other
        for other in answers
        if other.action != answer.action
        and other.text.strip() not in answer.text
        and not _contains(answer.before, other.body)
    ]
    return Random(answer.key).choice(others) if others else None


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == tuple(part) for i in range(len(ids) - len(part) + 1))


async def _add_counterfactuals(
    known: Knowledge, engine: Engine, probes: Sequence[tuple[Answer, Sequence[float]]], answers: Sequence[Answer]
) -> None:
    """Compare each true answer with another command's, in the same place, by their mean nats a token."""
    by_task: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.task_id].append(answer)
    pairs = [(answer, scores, other_answer(answer, by_task[answer.task_id])) for answer, scores in probes]
    found = [(answer, scores, other) for answer, scores, other in pairs if other is not None]
    rows = [
        Trajectory(
            task_id=answer.task_id,
            sample_index=0,
            segments=(Segment(TokenRole.CONTEXT, answer.before), Segment(TokenRole.ENV_OUTPUT, other.body)),
        )
        for answer, _, other in found
    ]
    scored = await engine.score(rows) if rows else []
    for (answer, scores, other), logprobs in zip(found, scored, strict=True):
        true = _mean_nats(scores[answer.start : answer.start + len(answer.body)])
        false, task = _mean_nats(logprobs[len(answer.before) :]), known.tasks[answer.task_id]
        task.pairs, task.preferred = task.pairs + 1, task.preferred + (true < false)
        task.margin += false - true
        if example := known.examples.get(answer.key):
            example.other, example.other_ce = other.text[:MAX_CHARS], false


def _mean_nats(logprobs: Sequence[float]) -> float:
    return -sum(logprobs) / len(logprobs)


async def _add_predictions(known: Knowledge, engine: Engine, renderer: Renderer, answers: Sequence[Answer]) -> None:
    """Let the policy write the answers, by its most probable tokens, and compare them line by line."""
    sampler = engine.sampler(SamplingParams(temperature=0.0, max_tokens=MAX_PREDICTED))
    rooms = [min(MAX_PREDICTED, 2 * len(answer.body) + 16) for answer in answers]
    written = await asyncio.gather(*[predict(sampler, renderer, *pair) for pair in zip(answers, rooms, strict=True)])
    for answer, text in zip(answers, written, strict=True):
        true, predicted, task = lines_of(answer.text), lines_of(text), known.tasks[answer.task_id]
        task.answers, task.exact = task.answers + 1, task.exact + (true == predicted)
        task.lines, task.predicted_lines = task.lines + len(true), task.predicted_lines + len(predicted)
        task.matched_lines += (Counter(true) & Counter(predicted)).total()
        if example := known.examples.get(answer.key):
            example.written = text[:MAX_CHARS]


async def predict(sampler: Sampler, renderer: Renderer, answer: Answer, room: int) -> str:
    """Let the policy write the answer itself: at most ``room`` tokens, without the ending of a message."""
    async with sampler.session(f"predict/{answer.key}") as session:
        completion = await session.sample(answer.before, room)
    return written_text(completion.token_ids, completion.stopped, renderer, answer.ending)


def written_text(token_ids: Sequence[int], stopped: bool, renderer: Renderer, ending: str) -> str:
    """Return the text of sampled ids without the stop token and without what a chat template writes after a message."""
    text = renderer.encoder.decode(token_ids[:-1] if stopped else token_ids)
    return text.split(ending)[0] if ending else text


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not blank, without white space at their ends."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]

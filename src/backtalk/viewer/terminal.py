"""One trajectory in the terminal: every token in the colour of its role, and what it weighed in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from backtalk.errors import DataError
from backtalk.run.log import RunLog
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from backtalk.viewer.text import LOOKS, load_tokenizer, token_texts
from backtalk.viewer.weights import RowWeights, step_objective, step_weights


@dataclass(frozen=True, slots=True)
class Shown:
    """A trajectory with what is needed to show it."""

    trajectory: Trajectory
    texts: Sequence[str]
    weights: RowWeights
    title: str


def find_trajectory(
    folder: str | Path, *, step: int | None = None, group: int = 0, sample: int = 0, evaluation: bool = False
) -> Shown:
    """A trajectory of a run: of a training step, or of the evaluation before that step; the last one by default.

    Raises:
        DataError: there is no such step, group or sample.
    """
    log = RunLog(folder)
    config = log.read_config()
    step = _pick_step(log, step, evaluation)
    groups = find_groups(folder, step=step, evaluation=evaluation)
    _check_range("group", group, len(groups))
    _check_range("sample", sample, len(groups[group]))
    trajectory = groups[group].trajectories[sample]
    weights = _no_weights(trajectory)
    if not evaluation:
        weights = step_weights(groups, step_objective(config, step))[group][sample]
    kind = "evaluation before step" if evaluation else "training step"
    title = f"{kind} {step} · group {group} of {len(groups)} · sample {sample} of {len(groups[group])}"
    return Shown(trajectory, token_texts(load_tokenizer(log.tokenizer_path), trajectory.token_ids), weights, title)


def find_groups(folder: str | Path, *, step: int | None = None, evaluation: bool = False) -> list[TrajectoryGroup]:
    """The groups of a training step, or of the evaluation before it; of the last one by default.

    Raises:
        DataError: there is no such step.
    """
    log = RunLog(folder)
    log.read_config()  # a folder that is no run is told so
    step = _pick_step(log, step, evaluation)
    return log.read_evaluation_groups(step) if evaluation else log.read_groups(step)


def _pick_step(log: RunLog, step: int | None, evaluation: bool) -> int:
    steps = log.evaluation_steps() if evaluation else log.group_steps()
    kind = "evaluation" if evaluation else "training step"
    if not steps:
        raise DataError(f"{log.folder} has no finished {kind} yet; wait for the first one")
    if step is not None and step not in steps:
        raise DataError(f"{log.folder} has no {kind} {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def show(
    folder: str | Path,
    console: Console,
    *,
    step: int | None = None,
    group: int = 0,
    sample: int = 0,
    evaluation: bool = False,
) -> None:
    """Print one trajectory of a run."""
    console.print(render(find_trajectory(folder, step=step, group=group, sample=sample, evaluation=evaluation)))


def render(shown: Shown) -> RenderableType:
    """Heading, legend with the tokens and weight of each role, and the tokens themselves."""
    return Group(*_parts(shown))


def _parts(shown: Shown) -> Iterator[RenderableType]:
    trajectory, weights = shown.trajectory, shown.weights
    reward = "no reward" if trajectory.reward is None else f"reward {trajectory.reward:g}"
    yield Rule(Text(f"{trajectory.task_id} · {shown.title}"))
    facts = [
        reward,
        f"advantage {weights.advantage:+.3f}",
        trajectory.stop_reason.value,
        f"{trajectory.num_turns} turns",
    ]
    if len(trajectory.branches) > 1:
        facts.append(f"{len(trajectory.branches)} branches")
    if trajectory.failure is not None:
        facts.append(f"failed at {trajectory.failure.where}: {trajectory.failure.error}: {trajectory.failure.message}")
    yield Text(" · ".join(facts))
    yield _legend(shown)
    branch = 0
    for start, end, segment in trajectory.spans():
        if segment.branch != branch:
            branch = segment.branch
            yield Rule(Text(branch_line(branch)), style="yellow")
        yield _heading(shown.weights, start, end, segment)
        text = Text()
        for position in range(start, end):
            trained = weights.policy[position] != 0 or weights.world[position] != 0
            text.append(shown.texts[position], style=LOOKS[segment.role][0] + (" underline" if trained else ""))
        if text.plain:
            text.rstrip()
            yield text


def branch_line(branch: int) -> str:
    """What stands where a new branch begins."""
    return f"branch {branch}: the history so far was rewritten, and sampling went on from here"


def _heading(weights: RowWeights, start: int, end: int, segment: Segment) -> Text:
    """Whose stretch this is, in words too: colours may be missing."""
    what = [segment.role.name, f"{end - start} tokens"]
    if segment.turn is not None:
        what.insert(0, f"turn {segment.turn}")
    if segment.tool:
        what.append(segment.tool)
    if segment.logprobs:
        what.append(f"mean logprob {sum(segment.logprobs) / len(segment.logprobs):.3f}")
    if segment.role is TokenRole.ACTION and not segment.is_sampled:
        what.append("not sampled")
    for name, row in (("policy", weights.policy), ("world", weights.world)):
        if any(row[start:end]):
            what.append(f"{name} weight {row[start]:+.2e} each")
    return Text("── " + " · ".join(what), style="dim")


def _legend(shown: Shown) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("role", "is", "tokens", "policy weight", "world weight"):
        table.add_column(column, justify="left" if column in ("role", "is") else "right")
    roles = shown.trajectory.roles
    for role, (style, _, _, meaning) in LOOKS.items():
        positions = [i for i, other in enumerate(roles) if other is role]
        policy = sum(shown.weights.policy[i] for i in positions)
        world = sum(shown.weights.world[i] for i in positions)
        table.add_row(
            Text(role.name, style=style),
            meaning,
            str(len(positions)),
            f"{policy:+.2e}" if policy else "-",
            f"{world:+.2e}" if world else "-",
        )
    table.caption = "underlined tokens are trained on; a policy weight is signed by the advantage"
    table.caption_justify = "left"
    return table


def _no_weights(trajectory: Trajectory) -> RowWeights:
    return RowWeights(0.0, [0.0] * len(trajectory), [0.0] * len(trajectory))


def _check_range(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise DataError(f"there is no {what} {index}; pass 0 to {count - 1}")


def list_groups(groups: Sequence[TrajectoryGroup]) -> Table:
    """The groups of a step: task, rewards, tokens by role."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("group", "task", "rewards", "turns", "ACTION", "ENV_OUTPUT"):
        table.add_column(column, justify="left" if column in ("task", "rewards") else "right")
    for number, group in enumerate(groups):
        table.add_row(
            str(number),
            group.task_id,
            " ".join("-" if reward is None else f"{reward:g}" for reward in group.rewards),
            str(sum(t.num_turns for t in group)),
            str(sum(t.count(TokenRole.ACTION) for t in group)),
            str(sum(t.count(TokenRole.ENV_OUTPUT) for t in group)),
        )
    return table

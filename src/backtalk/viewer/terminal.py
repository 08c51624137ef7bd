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
from backtalk.trajectory import Segment, TokenRole, TokenWeights, Trajectory, TrajectoryGroup
from backtalk.viewer.text import LOOKS, load_tokenizer, token_texts


@dataclass(frozen=True, slots=True)
class Shown:
    """A trajectory with what is needed to show it. ``weights`` is None where nothing was trained on it."""

    trajectory: Trajectory
    texts: Sequence[str]
    weights: TokenWeights | None
    title: str

    @property
    def facts(self) -> list[str]:
        """Reward, advantage and ending, in words."""
        reward, weights = self.trajectory.reward, self.weights
        if weights is None:
            advantage = "no weights on record: no step was trained on it"
        elif weights.advantage is None:
            advantage = "no advantage: outside the policy term"
        else:
            advantage = f"advantage {weights.advantage:+.3f}"
        ending = self.trajectory.stop_reason.value
        return ["no reward" if reward is None else f"reward {reward:g}", advantage, ending]

    def weights_at(self, position: int) -> tuple[float, float]:
        """Return a token's weight in the policy term and in the world-model term."""
        weights = self.weights
        return (0.0, 0.0) if weights is None else (weights.policy[position], weights.world[position])


def find_trajectory(
    folder: str | Path, *, step: int | None = None, group: int = 0, sample: int = 0, evaluation: bool = False
) -> Shown:
    """A trajectory of a run: of a training step, or of the evaluation before that step; the last one by default.

    Raises:
        DataError: there is no such step, group or sample.
    """
    log = RunLog(folder)
    log.read_config()  # a folder that is no run is told so
    step = _pick_step(log, step, evaluation)
    groups = find_groups(folder, step=step, evaluation=evaluation)
    _check_range("group", group, len(groups))
    _check_range("sample", sample, len(groups[group]))
    trajectory = groups[group].trajectories[sample]
    weights = None if evaluation else log.read_weights(step, groups)
    kind = "evaluation before step" if evaluation else "training step"
    title = f"{kind} {step} · group {group} of {len(groups)} · sample {sample} of {len(groups[group])}"
    texts = token_texts(load_tokenizer(log.tokenizer_path), trajectory.token_ids)
    return Shown(trajectory, texts, weights[group][sample] if weights else None, title)


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
    trajectory = shown.trajectory
    yield Rule(Text(f"{trajectory.task_id} · {shown.title}"))
    facts = [*shown.facts, f"{trajectory.num_turns} turns"]
    if len(trajectory.branches) > 1:
        facts.append(f"{len(trajectory.branches)} branches")
    if trajectory.failure is not None:
        facts.append(f"failed at {trajectory.failure.phase}: {trajectory.failure.error}: {trajectory.failure.message}")
    yield Text(" · ".join(facts))
    yield _legend(shown)
    branch = 0
    for start, end, segment in trajectory.spans():
        if segment.branch != branch:
            branch = segment.branch
            yield Rule(Text(branch_line(branch)), style="yellow")
        yield _heading(shown, start, end, segment)
        text = Text()
        for position in range(start, end):
            trained = any(shown.weights_at(position))
            text.append(shown.texts[position], style=LOOKS[segment.role][0] + (" underline" if trained else ""))
        if text.plain:
            text.rstrip()
            yield text


def branch_line(branch: int) -> str:
    """Return the heading of a new branch."""
    return f"branch {branch}: the history so far was rewritten, and sampling went on from here"


def _heading(shown: Shown, start: int, end: int, segment: Segment) -> Text:
    """Return the role, turn, tool and weights of a segment in words: colours may be missing."""
    what = [segment.role.name, f"{end - start} tokens"]
    if segment.turn is not None:
        what.insert(0, f"turn {segment.turn}")
    if segment.tool:
        what.append(segment.tool)
    if segment.logprobs:
        what.append(f"mean logprob {sum(segment.logprobs) / len(segment.logprobs):.3f}")
    if segment.role is TokenRole.ACTION and not segment.is_sampled:
        what.append("not sampled")
    for name, term in (("policy", 0), ("world", 1)):
        found = [weight for i in range(start, end) if (weight := shown.weights_at(i)[term])]
        if found:
            each = "each" if len(found) == end - start else f"on {len(found)} of them"
            what.append(f"{name} weight {found[0]:+.2e} {each}")
    return Text("── " + " · ".join(what), style="dim")


def _legend(shown: Shown) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("role", "is", "tokens", "policy weight", "world weight"):
        table.add_column(column, justify="left" if column in ("role", "is") else "right")
    roles = shown.trajectory.roles
    for role, (style, _, _, meaning) in LOOKS.items():
        positions = [i for i, other in enumerate(roles) if other is role]
        policy, world = (sum(shown.weights_at(i)[term] for i in positions) for term in (0, 1))
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

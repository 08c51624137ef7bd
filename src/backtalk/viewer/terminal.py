"""Print one rollout in the terminal: every token in the colour of its role, with its weight in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from backtalk.trajectory import Segment, TokenRole, TrajectoryGroup
from backtalk.viewer.data import LOOKS, ShownRollout


@console.group()
def render(shown: ShownRollout) -> Iterator[console.RenderableType]:
    """Yield heading, legend with tokens and weight of each role, and the tokens themselves, for a rich console."""
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


def _heading(shown: ShownRollout, start: int, end: int, segment: Segment) -> Text:
    """Return the role, turn, tool and weights of a segment in words, for terminals without colours."""
    facts = [segment.role.name, f"{end - start} tokens"]
    if segment.turn is not None:
        facts.insert(0, f"turn {segment.turn}")
    if segment.tool:
        facts.append(segment.tool)
    if segment.logprobs:
        facts.append(f"mean logprob {sum(segment.logprobs) / len(segment.logprobs):.3f}")
    if segment.role is TokenRole.ACTION and not segment.is_sampled:
        facts.append("not sampled")
    for name, term in (("policy", 0), ("world", 1)):
        found = [weight for i in range(start, end) if (weight := shown.weights_at(i)[term])]
        if found:
            each = "each" if len(found) == end - start else f"on {len(found)} of them"
            facts.append(f"{name} weight {found[0]:+.2e} {each}")
    return Text("── " + " · ".join(facts), style="dim")


def _legend(shown: ShownRollout) -> Table:
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


def list_groups(groups: Sequence[TrajectoryGroup]) -> Table:
    """Return a table of the groups of a step: task, rewards, tokens by role."""
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

"""Lay out the tables of `backtalk account`: rollouts side by side, then turns and tools of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from backtalk.evidence.account.losses import Loss
from backtalk.evidence.account.report import KINDS, SPOKEN, Account, Tally, total_of

COLUMNS = 4  # so many rollouts have a column each; of more only the sum is shown
MUCH = 0.1  # nats a token between recorded logprobs and the model's

Rows = Iterable[tuple[str, Callable[[Account], str]]]


def tables(
    accounts: Sequence[Account],
    unit: str,
    scored: Sequence[Account] = (),
    step: Sequence[Loss] = (),
    model: str | None = None,
    coeff: float = 0.05,
) -> Iterator[RenderableType]:
    """Yield the tables of ``accounts``, in tokens of ``unit``, and of ``scored``, the same with losses of a model."""
    total = total_of(scored or accounts, step)
    yield _side_by_side(f"Tokens, in {unit}", accounts, total_of(accounts), _token_rows())
    if scored:
        yield _side_by_side(f"Losses of {model}, from one forward pass", scored, total, _loss_rows(coeff))
    whose = f"in tokens of {model}" if scored else f"in {unit}"
    turns = sorted(total.turns.items())
    yield _breakdown(f"By turn, {whose}", {f"{turn} {tool}": found for (turn, tool), found in turns})
    yield _breakdown(f"By tool, {whose}", total.tools)
    yield Text("\n".join(f"- {note}" for note in _notes(accounts, scored)))


def _side_by_side(title: str, accounts: Sequence[Account], total: Account, rows: Rows) -> Table:
    columns = [*(accounts if len(accounts) <= COLUMNS else ()), *([total] if len(accounts) > 1 else ())]
    table = _table(title, [account.name for account in columns])
    for label, cell in rows:
        table.add_row(label, *map(cell, columns))
    return table


def _token_rows() -> Rows:
    yield "reward", lambda account: _number(account.reward, "g")
    yield "turns", lambda account: f"{account.num_turns:,}"
    for kind in KINDS:
        yield kind, lambda account, kind=kind: f"{account.whole.tokens[kind]:,}"
    yield "learnable", lambda account: f"{account.whole.learnable:,}"
    yield "discarded by RL", lambda account: f"{account.whole.tokens['env_output']:,}"
    yield "share discarded", lambda account: _number(account.whole.discarded_share, ".1%")
    yield "per action token", lambda account: _ratio(account.whole)


def _loss_rows(coeff: float) -> Rows:
    tokens = "{0.action_tokens:,} + {0.observed_tokens:,}".format
    yield "advantage", lambda account: _number(account.advantage, "+.3f")
    for kind in SPOKEN:
        yield f"CE of {kind}", lambda account, kind=kind: _number(account.whole.cross_entropy(kind), ".4f")
    for name, label in (("grpo", "GRPO"), ("echo", f"ECHO, {coeff:g}"), ("verifier_free", "verifier-free")):
        yield label, lambda account, name=name: _of(account, name, lambda loss: f"{loss.total:+.4f}")
        yield "  on tokens", lambda account, name=name: _of(account, name, tokens)


def _breakdown(title: str, tallies: Mapping[str, Tally]) -> Table:
    has_nats = any(found.nats is not None for found in tallies.values())
    table = _table(title, [*SPOKEN, "discarded", *(("CE action", "CE env") if has_nats else ())])
    for name, found in tallies.items():
        counts = [f"{found.tokens[kind]:,}" for kind in SPOKEN]
        nats = [_number(found.cross_entropy(kind), ".3f") for kind in SPOKEN[:2]] if has_nats else []
        table.add_row(name, *counts, _number(found.discarded_share, ".1%"), *nats)
    return table


def _notes(accounts: Sequence[Account], scored: Sequence[Account]) -> Iterator[str]:
    yield "learnable: action + env_output. Ordinary RL trains on action alone and discards the rest"
    if scored:
        yield "CE: nats a token at temperature 1. On tokens: action + observed tokens with a gradient that is not 0"
    unsampled = sum(account.whole.unsampled for account in accounts)
    if unsampled:
        yield (
            f"{unsampled:,} tokens of the agent have no logprobs (a script's, a person's, an imported text, or other "
            "tokens than were sampled). They count as actions here; training never gives them to the policy term"
        )
    if any(account.whole.unsampled and account.advantage is not None for account in scored):
        yield "GRPO takes their ratio to be 1, as if the model had just sampled them"
    if scored and all(account.advantage == account.reward for account in scored):
        yield "the advantage is the reward: a rollout without siblings has no other; --advantage sets one"
    gap = max((account.gap for account in scored if account.gap is not None), default=0.0)
    if gap > MUCH:
        yield (
            f"the recorded logprobs are {gap:.2f} nats a token away from this model's at temperature 1, so it is not "
            "the one that sampled; ratios are clipped as in training"
        )


def _of(account: Account, name: str, text: Callable[[Loss], str]) -> str:
    return next((text(loss) for loss in account.losses if loss.name == name), "-")


def _ratio(found: Tally) -> str:
    actions = found.tokens["action"]
    return f"{found.tokens['env_output'] / actions:.1f}" if actions else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(title: str, columns: Sequence[str]) -> Table:
    bare: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=Text(title), title_justify="left", title_style="bold", **bare)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table

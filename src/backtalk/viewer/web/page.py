"""Write the parts of a self-contained HTML page: no script, no network, everything inline."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from backtalk.settings import flatten
from backtalk.trajectory import Segment, TokenRole
from backtalk.viewer.data import LOOKS, ShownRollout
from backtalk.viewer.terminal import branch_line

MAX_SHOWN_TOKENS = 4000  # of one trajectory

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2328;
       background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #d8dee4; vertical-align: top }
td.n, th.n { text-align: right }
img { max-width: 100%; height: auto }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem;
      border: 1px solid #d8dee4; border-radius: 6px }
summary { cursor: pointer; font-weight: 600 }
.b { display: block; margin: .6rem 0; border-top: 2px solid #9a6700; color: #9a6700 }
.muted { color: #57606a } .t { border-bottom: 1px solid currentColor }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document."""
    roles = "\n".join(f".r{int(role)} {{ color: {c}; background: {b} }}" for role, (_, c, b, _) in LOOKS.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{roles}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def link(target: str, text: str) -> str:
    return f'<p><a href="{escape(target)}">{escape(text)}</a></p>'


def image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ["", *[' class="n"'] * (len(cells) - 1)]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def settings(tree: Mapping[str, Any]) -> str:
    """Return nested settings as a table, folded away."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in flatten(tree).items())
    return f"<details><summary>all of them</summary><table>{rows}</table></details>"


def legend() -> str:
    roles = " ".join(f'<span class="r{int(r)}">{r.name}</span> {escape(LOOKS[r][3])}.' for r in TokenRole)
    return f'<p>{roles} <span class="t">Underlined</span> tokens are trained on; point at one for its numbers.</p>'


def trajectory(shown: ShownRollout, *, opened: bool = False) -> str:
    """Return a rollout, tokens coloured by role, each with its numbers as a tooltip."""
    t, spans = shown.trajectory, []
    position = branch = 0
    for segment in t.segments:
        if segment.branch != branch and position < MAX_SHOWN_TOKENS:
            spans.append(f'<span class="b">{escape(branch_line(segment.branch))}</span>')
        branch = segment.branch
        for offset in range(len(segment)):
            if position < MAX_SHOWN_TOKENS:
                spans.append(_token(shown, position, segment, offset))
            position += 1
    left_out = f"\n({position - MAX_SHOWN_TOKENS} more tokens)" if position > MAX_SHOWN_TOKENS else ""
    title = " · ".join([t.task_id, shown.title, *shown.facts])
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>"
        f"<pre>{''.join(spans)}{left_out}</pre></details>"
    )


def _token(shown: ShownRollout, position: int, segment: Segment, offset: int) -> str:
    role, turn, logprobs = segment.role, segment.turn, segment.logprobs
    policy, world = shown.weights_at(position)
    facts = [role.name, f"id {shown.trajectory.token_ids[position]}"]
    facts += [] if turn is None else [f"turn {turn}"]
    if role is TokenRole.ACTION:
        facts.append("not sampled" if logprobs is None else f"logprob {logprobs[offset]:.4f}")
    facts += [f"policy weight {policy:+.3e}"] if policy else []
    facts += [f"world weight {world:+.3e}"] if world else []
    trained = " t" if policy or world else ""
    text = escape(shown.texts[position])
    return f'<span class="r{int(role)}{trained}" title="{escape(", ".join(facts))}">{text}</span>'

"""What people see of a run: weights that are on record, text that cannot steer a terminal, whole pages."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from shown import GROUPS, HOSTILE, TOKENIZER, encode, read_page, train_on, write_run

from backtalk.errors import DataError
from backtalk.run.log import RunLog
from backtalk.trajectory import Segment, TokenRole, TrajectoryGroup
from backtalk.viewer.data import find_groups, find_rollout, token_texts, visible
from backtalk.viewer.report.run import write_report
from backtalk.viewer.report.study import read_study
from backtalk.viewer.terminal import list_groups, render

# ---------------------------------------------------------------- text


def test_tokens_become_the_text_they_are_of_and_control_characters_are_pictures() -> None:
    texts = token_texts(TOKENIZER.backend_tokenizer, encode(HOSTILE))
    assert len(texts) == len(encode(HOSTILE))
    assert "".join(texts) == "␛]0;owned␇<script>alert(1)</script> ünï☃"
    assert visible("a\tb\nc\x7f\x9b\r") == "a\tb\nc␡\ufffd␍"
    lone = token_texts(TOKENIZER.backend_tokenizer, encode("ü")[:1])  # half a character
    assert lone == ["\ufffd"]


# ---------------------------------------------------------------- a run folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def shown(folder: Path, **which: Any) -> str:
    out = StringIO()
    Console(file=out, width=120, color_system=None).print(render(find_rollout(folder, **which)))
    return out.getvalue()


def test_a_trajectory_is_readable_without_colours(run: Path) -> None:
    text = shown(run, step=0, group=0, sample=1)
    assert "training step 0" in text and "reward 0" in text
    assert re.search(r"turn 0 · ACTION · \d+ tokens · mean logprob -0.500 · policy weight -", text)
    assert re.search(r"turn 0 · ENV_OUTPUT · \d+ tokens · bash · world weight \+", text)
    assert "␛]0;owned␇" in text and "\x1b" not in text
    assert "<bash>ls</bash>" in text
    assert "failed at score: VerifierError: no reward" in shown(run, group=1, sample=1)


def test_where_a_branch_begins_is_said(run: Path) -> None:
    plain = GROUPS[0].trajectories[0]
    again = (
        Segment(TokenRole.CONTEXT, encode("count the lines, ls"), branch=1),
        Segment(TokenRole.ENV_OUTPUT, encode("total 3"), None, 1, "bash", 1),
    )
    forked = replace(plain, segments=(*plain.segments, *again))
    train_on(RunLog(run), 1, [TrajectoryGroup("a", (forked, GROUPS[0].trajectories[1]))])
    text = shown(run)
    line = "branch 1: the history so far was rewritten"
    assert text.count(line) == 1 and "2 branches" in text
    assert text.index("total 12") < text.index(line) < text.index("total 3")
    assert line not in shown(run, sample=1) and "branches" not in shown(run, sample=1)


def test_trained_tokens_are_underlined_and_roles_have_colours(run: Path) -> None:
    out = StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="standard")
    console.print(render(find_rollout(run, group=0, sample=0)))
    assert "\x1b[1;4;32m" in out.getvalue()  # bold, underlined, green: an action
    assert "\x1b[4;36m" in out.getvalue()  # underlined, cyan: what the world said
    assert "\x1b[33m" in out.getvalue()  # yellow, not underlined: the harness


def test_an_evaluation_weighs_nothing(run: Path) -> None:
    text = shown(run, evaluation=True)
    assert "evaluation before step 0" in text and "weight +" not in text and "weight -" not in text
    assert "no weights on record: no step was trained on it" in text and "· advantage" not in text


def test_weights_that_are_not_on_record_are_not_guessed(run: Path) -> None:
    assert "advantage +0.707" in shown(run, step=1) and "outside the policy term" in shown(run, group=1, sample=1)
    RunLog(run).weights_path(1).unlink()
    text = shown(run, step=1)
    assert "no weights on record" in text and "· advantage" not in text and "weight +" not in text


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training step 7; there are 0, 1"):
        shown(run, step=7)
    with pytest.raises(DataError, match="there is no group 9; pass 0 to 1"):
        shown(run, group=9)
    with pytest.raises(DataError, match="not a run folder"):
        find_groups(tmp_path / "absent")
    with pytest.raises(DataError, match="not a run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no finished study"):
        read_study(tmp_path)


def test_groups_are_listed_with_their_rewards(run: Path) -> None:
    out = StringIO()
    Console(file=out, width=120).print(list_groups(find_groups(run)))
    assert re.search(r"1\s+b\s+0\.5 -", out.getvalue())


def test_the_report_is_the_page_as_one_file(run: Path) -> None:
    index, rollouts = read_page(write_report(run))
    assert len(index["curves"]) == 1 and len(index["rows"]) == len(rollouts)
    weights = [found["tokens"]["policy"] for key, found in rollouts.items() if "train-1" in key]
    assert any(weight for row in weights if row for weight in row)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_only_begun_has_a_report_too(run: Path) -> None:
    log = RunLog(run)
    log.truncate_after(-1)
    log.evaluation_path(0).unlink()
    index, rollouts = read_page(write_report(run))
    assert index["rows"] == [] and rollouts == {} and index["problems"] == []

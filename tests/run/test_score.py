"""Scores of rollouts at checkpoints: those of the engine, beside what was scored, one checkpoint after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError, DataError
from backtalk.run.log import RunLog
from backtalk.run.log.scores import add_scores, read_scored, read_scores_row, scores_beside, tokens_scored
from backtalk.run.score import Scored, score
from backtalk.trajectory import TokenRole, TokenScores
from backtalk.viewer.live.app import Viewer
from backtalk.viewer.live.sources import Library
from viewer.recorded import A, B, write_run


async def test_a_run_is_scored_beside_its_rollouts_and_truncated_with_them(tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path / "run"))
    told: list[Scored] = []
    await score([log.folder], ["base"], on_scored=told.append, alternatives=2)
    assert [row.what for row in told] == ["run, training step 1", "run, evaluation before step 0"]
    path, rollouts = log.scores_path(1), [*A, *B]
    names, surprise = read_scored(path)
    assert names == ["before", "after", "base"]  # what was there stays
    engine = TorchEngine(TorchConfig(model="base"))
    for i, (trajectory, known) in enumerate(zip(rollouts, await engine.score(rollouts), strict=True)):
        row = read_scores_row(path, i, len(trajectory))["base"]
        assert row.logprobs == pytest.approx(known, abs=1e-5)
        output = [-x for x, role in zip(known, trajectory.roles, strict=True) if role is TokenRole.ENV_OUTPUT]
        assert surprise[i] == pytest.approx(sum(output) / len(output), abs=1e-5)
        assert all(len(tokens) == 2 and tokens[0][1] > row.logprobs[at] for at, tokens in row.expected.items())
    total = sum(surprise[i] * t.count(TokenRole.ENV_OUTPUT) for i, t in enumerate(rollouts) if surprise[i] is not None)
    assert told[0].env_ce == pytest.approx(total / told[0].env_tokens)
    log.truncate_after(0)
    assert not path.exists() and log.scores_path(0, evaluation=True).exists()


async def test_text_of_others_is_scored_in_the_tokens_of_the_model_and_viewed_so(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    said = [("user", "Count the files."), ("assistant", "ls"), ("tool", "notes.txt")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    await score([path], ["shop"])
    assert tokens_scored(scores_beside(path)) == "shop"
    library = Library([tmp_path])
    try:
        assert list(library.sources()) == ["chat.jsonl"]  # its scores are no trajectories
        viewer = Viewer(library)
        (row,) = viewer.rollouts({})["rows"]
        (found,) = read_scored(scores_beside(path))[1]
        assert row["surprise"] == found and library.source("chat.jsonl").tokens_of == "shop"
        assert list(viewer.rollout({"run": "chat.jsonl", "part": "file", "row": "0"})["surprises"]) == ["shop"]
    finally:
        library.close()


async def test_what_cannot_be_scored_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(DataError, match="no checkpoint yet"):
        await score([run])  # base, and its own, which it has not got
    with pytest.raises(ConfigError, match="shop has another tokenizer than"):
        await score([run], ["shop"])
    with pytest.raises(DataError, match="no step 7; there are 0 to 1"):
        await score([run], ["base"], steps=[7])
    with pytest.raises(ConfigError, match="nothing says which models"):
        await score([tmp_path / "run", run], [])


def test_scores_of_other_rollouts_do_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = [TokenScores((-1.0,) * len(t)) for t in A]
    add_scores(path, "x", "base", A.trajectories, rows)
    add_scores(path, "y", "base", A.trajectories, rows)
    assert read_scored(path)[0] == ["x", "y"]
    add_scores(path, "z", "base", B.trajectories, [TokenScores((-1.0,) * len(t)) for t in B])
    assert read_scored(path)[0] == ["z"]
    with pytest.raises(ValueError, match="do not fit"):
        add_scores(path, "z", "base", A.trajectories, rows[:1])

"""Trajectories that others published, used where a checkout has them beside it; they are no part of the project."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"
ATIF = DATA / "endless_terminals_atif.jsonl.gz"
AWM = DATA / "awm_e_commerce_33_episode.json"


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"{path} is not here; it is no part of the project")

"""The Tinker engine under test: steps on services within the process, one for either reduction."""

from __future__ import annotations

from pathlib import Path

from backtalk.engines.remote.config import Reduction
from backtalk.engines.remote.conformance import RemoteUnderTest
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.local import LocalService
from backtalk.engines.tinker.config import TinkerConfig

REDUCTIONS: tuple[Reduction, ...] = ("sum", "row_mean")


class TinkerUnderTest(RemoteUnderTest):
    """The engine against a service under each reduction."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__({reduction: _engine(model_folder, reduction) for reduction in REDUCTIONS})


def _engine(folder: Path, reduction: Reduction) -> tuple[LocalService, RemoteEngine]:
    service = LocalService(folder, reduction)
    config = TinkerConfig(model=str(folder), learning_rate=0.0, reduction=reduction)
    return service, RemoteEngine(config, lambda: service)

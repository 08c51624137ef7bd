"""The Foundry engine under test: the SDK talks to a server here, whose model tells the gradient that it applied."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from backtalk.engines.foundry import sdk
from backtalk.engines.foundry.config import FoundryConfig
from backtalk.engines.foundry.loopback import Loopback
from backtalk.engines.remote.conformance import RemoteUnderTest
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.local import LocalService


class AccessToken(NamedTuple):
    """A token as a credential of Azure returns it."""

    token: str
    expires_on: int


class OneToken:
    """A credential of Azure with one token, for a server that asks for none of Azure's."""

    def __init__(self, token: str = "loopback") -> None:
        self.token = token

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """Return the token; it lasts for an hour."""
        return AccessToken(self.token, int(time.time()) + 3600)


class FoundryUnderTest(RemoteUnderTest):
    """The engine over the SDK and HTTP, on a server that sums losses, as Foundry does by its documentation."""

    def __init__(self, model_folder: Path) -> None:
        service = LocalService(model_folder, "sum")
        config = FoundryConfig(
            model=str(model_folder), endpoint=Loopback(service).endpoint, learning_rate=0.0, reduction="sum"
        )
        engine = RemoteEngine(config, lambda: sdk.connect(config, credential=OneToken()))
        super().__init__({"sum": (service, engine)})

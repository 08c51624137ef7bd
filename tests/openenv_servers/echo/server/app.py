"""An echo with typed actions, laid out as ``openenv init`` does."""

import os
import time
from typing import Any, Literal

from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import BaseModel


class Place(BaseModel):
    street: str
    number: int = 1


class EchoAction(Action):
    """Say something to the echo."""

    message: str
    mood: Literal["calm", "loud"] = "calm"
    place: Place | None = None


class EchoObservation(Observation):
    echoed: str | None = None
    length: int | None = None
    error: str | None = None
    warning: str | None = None


class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self._seed = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> EchoObservation:
        self._state = State(episode_id=episode_id, step_count=0)
        self._seed = seed or 0
        return EchoObservation(echoed=f"Echo number {seed} is listening {sorted(kwargs)}.", reward=0.0)

    def step(self, action: EchoAction, timeout_s: float | None = None, **kwargs: Any) -> EchoObservation:
        self._state.step_count += 1
        match action.message.split():
            case ["die"]:
                os._exit(7)
            case ["raise"]:
                raise RuntimeError("the echo has a cold")
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["flood", count]:
                return EchoObservation(echoed="x" * int(count))
            case ["both"]:
                return EchoObservation(echoed="half", error="the rest was lost", warning="speak up")
            case ["silence"]:
                return EchoObservation()
            case ["stop"]:
                return EchoObservation(echoed="bye", done=True, reward=1.0)
        said = action.message.upper() if action.mood == "loud" else action.message
        return EchoObservation(echoed=f"{said} [{self._seed}]", reward=0.25)

    @property
    def state(self) -> State:
        return self._state


places = int(os.environ.get("ECHO_PLACES", "64"))
app = create_app(Echo, EchoAction, EchoObservation, env_name="echo", max_concurrent_envs=places)

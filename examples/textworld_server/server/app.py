"""TextWorld-Express as an OpenEnv environment: eight text games, with their own train, dev and test folds.

pip install openenv textworld-express      # and Java 8 or later
uvicorn server.app:app                      # from this folder; Backtalk runs it itself: openenv:./textworld_server

reset(game="coin", fold="train", seed=7, params="numLocations=3") begins the eighth game of a fold; a step is one
command. The reward of a step is how much the game's score rose, so that a game that is won sums to 1.
"""

import json
from functools import cache
from typing import Any

from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from textworld_express import TextWorldExpressEnv


class TextWorldAction(Action):
    """Say what you do next in the game, in a few words such as: look around."""

    command: str


class TextWorldObservation(Observation):
    observation: str


@cache
def java() -> Any:
    """Return the one Java machine, in which each game is an object."""
    return TextWorldExpressEnv()


class TextWorld(Environment):
    """One game at a time for one client."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    REQUIRES_SINGLE_THREAD_EXECUTOR = True  # the games share tables in Java; a step takes a millisecond

    def __init__(self) -> None:
        super().__init__()
        self._game: Any = None
        self._score, self._state = 0.0, State()

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        game: str = "coin",
        fold: str = "train",
        params: str = "",
        **kwargs: Any,
    ) -> TextWorldObservation:
        self._game = java()._gateway.jvm.textworldexpress.runtime.PythonInterface()
        self._score, self._state = 0.0, State(episode_id=episode_id)
        if problem := self._game.load(game, params):
            raise ValueError(problem)
        seeds = getattr(self._game, {"train": "getSeedsTrain", "dev": "getSeedsDev", "test": "getSeedsTest"}[fold])()
        answer = json.loads(self._game.generateNewGameJSON(seeds[(seed or 0) % len(seeds)], fold, False))
        return TextWorldObservation(observation=f"{self._game.getTaskDescription()}\n\n{answer['observation']}")

    def step(self, action: TextWorldAction, timeout_s: float | None = None, **kwargs: Any) -> TextWorldObservation:
        if self._game is None:
            raise RuntimeError("there is no game yet; call reset first")
        self._state.step_count += 1
        answer = json.loads(self._game.stepJSON(action.command))
        reward, self._score = answer["score"] - self._score, answer["score"]
        done = answer["tasksuccess"] or answer["taskfailure"]
        return TextWorldObservation(observation=answer["observation"], reward=reward, done=done)

    @property
    def state(self) -> State:
        return self._state


app = create_app(TextWorld, TextWorldAction, TextWorldObservation, env_name="textworld", max_concurrent_envs=128)

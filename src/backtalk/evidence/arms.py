"""Arms of a study: built-in ones by name, settings of one's own, and sweeps of a setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

from backtalk.errors import ConfigError
from backtalk.settings import did_you_mean, flatten

BUILT_IN_ARMS: Mapping[str, Mapping[str, Any]] = {  # what each changes in the study's settings
    "grpo": {"objective.world_model_coeff": 0.0},
    "echo": {},
    "env_only": {"objective.policy_coeff": 0.0},
    "shuffled": {"objective.world.observations": "shuffled"},
    "action_masked": {"objective.world.observations": "action_masked"},
    "matched": {"objective.world_model_coeff": {"share": 0.5}},
    "paw": {
        "objective.world.entropy_share": 0.75,
        "objective.world.loss": "clipped_mae",
        "objective.world.return_adaptive": True,
    },
}
NAME_KEY = "arm"  # names the built-in arm that settings of one's own are laid over
SWEEP_KEY = "sweep"  # lists values of settings: an arm for each


def read_arms(arms: Any, study: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each arm by dotted key.

    ``arms`` is a list of built-in names, or a mapping of names to a built-in name, to settings, or to settings with the
    built-in ``arm`` that they are laid over. A name with nothing behind it is that built-in arm. With a ``sweep`` of
    settings, each a list of values, it is one arm for each combination of them.

    Raises:
        ConfigError: no arms, an unknown built-in name, one name twice, or something else.
    """
    if isinstance(arms, list) and arms and all(isinstance(name, str) for name in arms):
        if twice := [name for name, count in Counter(arms).items() if count > 1]:
            raise ConfigError(f"study {study} has the arms {twice} twice; an arm is one setting, so name it once")
        arms = {name: name for name in arms}
    if not isinstance(arms, dict) or not all(isinstance(arm, str | dict | None) for arm in arms.values()):
        raise ConfigError(
            f"study {study} needs arms, by name or with their settings, for example 'arms: [grpo, echo, shuffled]' or "
            "'arms: {grpo: grpo, mine: {objective.world_model_coeff: 0.02}}'"
        )
    read = [entry for name, arm in arms.items() for entry in _swept(str(name), str(name) if arm is None else arm)]
    if twice := [name for name, count in Counter(name for name, _ in read).items() if count > 1]:
        raise ConfigError(f"study {study} has the arms {twice} twice; give one of them another name")
    return dict(read)


def _swept(name: str, arm: str | dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the arms of a name, more than one where it sweeps settings."""
    if isinstance(arm, str) or SWEEP_KEY not in arm:
        return [(name, _settings(name, arm))]
    sweep, rest = arm[SWEEP_KEY], {key: value for key, value in arm.items() if key != SWEEP_KEY}
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise ConfigError(
            f"arm {name!r} sweeps {sweep!r}, which lists no values of a setting; write for example "
            f"'{name}: {{sweep: {{objective.world_model_coeff: [0.01, 0.05, {{share: 0.2}}]}}}}'"
        )
    return [
        ("_".join([name, *map(_value_name, values)]), _settings(name, rest | dict(zip(sweep, values, strict=True))))
        for values in product(*sweep.values())
    ]


def _value_name(value: Any) -> str:
    """Return a value as part of a name: ``0.05``, or ``share0.2`` for ``{share: 0.2}``."""
    if isinstance(value, Mapping):
        return "-".join(f"{key}{_value_name(inner)}" for key, inner in value.items())
    return "-".join(map(_value_name, value)) if isinstance(value, list) else str(value).replace("/", "-")


def _settings(name: str, arm: str | dict[str, Any]) -> dict[str, Any]:
    changes = {NAME_KEY: arm} if isinstance(arm, str) else flatten(arm)
    built_in = changes.pop(NAME_KEY, "echo")  # which changes nothing
    if built_in not in BUILT_IN_ARMS:
        raise ConfigError(
            f"arm {name!r} is {built_in!r}, which is no built-in arm; use one of {', '.join(BUILT_IN_ARMS)}"
            f"{did_you_mean(str(built_in), list(BUILT_IN_ARMS))}, or give its settings, as in "
            f"'{name}: {{objective.world_model_coeff: 0.02}}'"
        )
    return {**BUILT_IN_ARMS[built_in], **changes}

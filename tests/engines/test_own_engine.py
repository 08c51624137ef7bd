"""An engine of the user's own: the example trains, is measured, resumed and served by its import path alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from backtalk.engines.choose import open_engine
from backtalk.errors import ConfigError
from backtalk.run.config import TrainConfig, config_from_dict, config_to_dict, load_config, setting_schemas
from backtalk.run.log import RunLog
from backtalk.run.train import evaluate_run, train
from backtalk.trajectory import Segment, TokenRole, Trajectory

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "bigram.yaml"
SMALL = {"tasks_per_step": 2, "group_size": 2, "evaluation.tasks": 1, "evaluation.samples_per_task": 1}
SMALL |= {"rollout.max_turns": 2, "rollout.max_tokens_per_turn": 8, "rollout.concurrency": 4, "checkpoint_every": 1}


@pytest.fixture(autouse=True)
def in_the_folder_that_holds_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


async def test_the_example_trains_and_a_resumed_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    for resume, steps in ((False, 1), (True, 2)):
        await train(load_config(EXAMPLE, SMALL | {"steps": steps}), tmp_path / "resumed", resume=resume)
    await train(load_config(EXAMPLE, SMALL | {"steps": 2}), tmp_path / "whole")
    logs = [RunLog(tmp_path / name) for name in ("resumed", "whole")]
    resumed, whole = ([row["world_model_loss"] for row in log.read_metrics()] for log in logs)
    assert resumed == whole and len(whole) == 2
    assert whole[1] < whole[0]  # what it is told about its calls is learned
    assert logs[0].read_config()["engine"] == {"kind": "examples.bigram_engine:BigramConfig", "learning_rate": 10.0}
    measured = await evaluate_run(tmp_path / "whole")
    assert (measured.step, (await evaluate_run(tmp_path / "whole", base=True)).step) == (2, 0)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"world_model_coeff": {"share": 0.2}}, r"share of the gradient.*use engine.kind=torch"),
        ({"world.conflict": "project"}, r"needs an engine that measures both terms' gradients; use engine.kind=torch"),
        ({"world.head": "keep"}, r"needs an engine that applies the output embedding itself.*use engine.kind=torch"),
    ],
)
async def test_what_an_engine_cannot_do_is_refused(tmp_path: Path, setting: dict[str, Any], said: str) -> None:
    config = load_config(EXAMPLE, SMALL | {"steps": 1} | {f"objective.{k}": v for k, v in setting.items()})
    with pytest.raises(ConfigError, match=said):
        await train(config, tmp_path / "run")
    assert not RunLog(tmp_path / "run").group_steps()


async def test_any_engine_can_leave_out_what_surprises_it(tmp_path: Path) -> None:
    options = {"objective.world.drop_surprising": 0.5, "objective.world_loss_target": "warning_only", "steps": 2}
    await train(load_config(EXAMPLE, SMALL | options), tmp_path / "run")
    log, shares = RunLog(tmp_path / "run"), []
    for step in (0, 1):
        groups = log.read_groups(step)
        rows = [trajectory for group in groups for trajectory in group]
        learned = sum(w > 0 for group in log.read_weights(step, groups) or () for row in group for w in row.world)
        shares.append(learned / sum(role is TokenRole.WARNING for row in rows for role in row.roles))
    # A table of zeros finds all tokens as likely, and none goes. Then half go, less those like the last to stay.
    assert shares[0] == 1.0 and 0.5 <= shares[1] < 0.8


async def test_a_table_of_zeros_scores_every_token_alike() -> None:
    engine = open_engine(load_config(EXAMPLE).engine)
    row = Trajectory(task_id="t", sample_index=0, segments=(Segment(TokenRole.CONTEXT, (1, 2, 3)),))
    assert await engine.score([row]) == [pytest.approx([0.0, *[-math.log(len(engine.tokenizer))] * 2])]


def test_another_engine_takes_the_place_of_the_settings_of_the_one_below() -> None:
    config = load_config("triage", ["engine.kind=examples.bigram_engine:BigramConfig", "engine.learning_rate=1e-1"])
    assert config.engine.learning_rate == 0.1
    assert "engine.learning_rate" in setting_schemas(config.engine.kind)
    assert "engine.model" not in setting_schemas(config.engine.kind)
    assert load_config("triage", ["engine.kind=torch"]) == load_config("triage")


class ModelConfig(BaseModel, frozen=True):
    kind: str = "test_own_engine:ModelConfig"
    size: int = 3

    def open(self, *, seed: int) -> Any:
        return ("opened", self.size, seed)


@dataclass(frozen=True)
class Opens:
    kind: str = "test_own_engine:Opens"


def test_a_pydantic_model_will_do_too() -> None:
    config = config_from_dict({"engine": {"kind": "test_own_engine:ModelConfig", "size": 4}})
    assert open_engine(config.engine, seed=5) == ("opened", 4, 5)
    assert config_to_dict(config)["engine"] == {"kind": "test_own_engine:ModelConfig", "size": 4}
    assert config_from_dict(config_to_dict(config)) == config
    assert config_to_dict(TrainConfig(engine=ModelConfig(size=4)))["engine"] == config_to_dict(config)["engine"]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "toch"}, "engine.kind='toch' is no engine; use torch, tinker, foundry, or my_module:MyEngineConfig"),
        ({"kind": 3}, "engine.kind=3 is no engine"),
        ({"kind": "no_such_module:Config"}, "start from the folder that holds the package, or install it"),
        ({"kind": "test_own_engine:Absent"}, "has no attribute 'Absent'"),
        ({"kind": "test_own_engine:Opens"}, "which opens no engine; name a dataclass of settings with a method open"),
        ({"kind": "test_own_engine:ModelConfig", "sise": 3}, "did you mean 'engine.size'?"),
        ({"kind": "test_own_engine:ModelConfig", "size": "big"}, "engine.size='big' is not a whole number"),
    ],
)
def test_a_kind_that_opens_no_engine_is_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"engine": engine})
    assert message in str(caught.value)

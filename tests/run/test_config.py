"""Settings: from YAML and back, and what is said about a wrong one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from backtalk.errors import ConfigError
from backtalk.objective.coefficient import Schedule, Share
from backtalk.run.config import (
    TrainConfig,
    config_from_dict,
    config_to_dict,
    json_schema,
    load_config,
    option_group,
    setting_schemas,
)
from backtalk.run.settings_file import parse_overrides, preset_names, read_yaml
from backtalk.settings import flatten


def test_every_setting_says_what_it_is() -> None:
    for engine in ("torch", "tinker", "foundry"):
        assert [key for key, schema in setting_schemas(engine).items() if not schema.get("description")] == []


def run_presets() -> list[str]:
    return [name for name in preset_names() if "arms" not in read_yaml(name)[0]]


def test_the_settings_of_a_run_fit_on_one_screen() -> None:
    keys = setting_schemas()
    assert len(keys) == len(set(keys))
    assert len({option_group(key) or key for key in keys}) <= 38


@pytest.mark.parametrize("name", run_presets())
def test_every_preset_loads_and_survives_the_way_to_yaml_and_back(name: str) -> None:
    config = load_config(name)
    tree = config_to_dict(config)
    assert config_from_dict(tree) == config
    assert sorted(flatten(tree)) == sorted(setting_schemas())


def test_a_file_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: triage\nsteps: 7\nrollout:\n  max_turns: 3\n")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nseed: 5\n")
    base, config = load_config("triage"), load_config(tmp_path / "other.yaml")
    assert (config.steps, config.rollout.max_turns, config.seed) == (7, 3, 5)
    assert config.rollout.max_tokens == base.rollout.max_tokens
    assert config.engine.learning_rate == base.engine.learning_rate


def test_overrides_come_last_and_read_numbers_as_a_person_writes_them() -> None:
    config = load_config("triage", ["engine.learning_rate=1e-5", "tasks.levels=[3]", "evaluation.recorded_path=null"])
    assert config.engine.learning_rate == 1e-5
    assert config.tasks.levels == (3,)
    assert config.evaluation.recorded_path is None
    assert load_config("triage", {"objective.world_model_coeff": 0}).objective.world_model_coeff == 0.0
    assert parse_overrides(["terminal.system_prompt=a: b=c"]) == {"terminal.system_prompt": "a: b=c"}


def test_what_follows_from_other_settings_is_filled_in() -> None:
    config = load_config("triage", ["objective.world_normalizer=fixed_length", "rollout.max_tokens=777"])
    assert config.objective.max_seq_len == 777


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.world_model_coef=0.1", "did you mean 'objective.world_model_coeff'"),
        ("lerning_rate=1", "did you mean 'engine.learning_rate'"),
        ("max_turns=3", "did you mean 'rollout.max_turns'"),
        ("engine.seed=1", "unknown setting 'engine.seed'"),
        ("zzz=1", "the settings are seed, steps"),
        ("steps=many", "steps='many' is not a whole number"),
        ("steps=1.5", "steps=1.5 is not a whole number"),
        ("steps=true", "steps=True is not a whole number"),
        ("engine.gradient_checkpointing=1", "is not true or false"),
        ("sandbox=docker", "use one of auto, bubblewrap, sandlock, unsafe"),
        ("rollout=3", "write its settings indented beneath it"),
        ("steps", "write steps=VALUE"),
        ("steps=-1", "use steps >= 0"),
        ("group_size=1", "use group_size >= 2, or set objective.policy_coeff=0"),
        ("temperature=0", "use temperature > 0"),
        ("tasks.levels=[]", "leaves no task to train on"),
        ("evaluation.samples_per_task=0", "samples_per_task >= 1"),
        ("rollout.max_turns=0", "max_turns=0"),
        ("rollout.straggler_factor=0", "use a number >= 1, for example 3, or null for none"),
        ("terminal.truncate=middle", "use one of both, head, tail"),
        ("terminal.tools=[submit]", "use [bash, submit], or [bash]"),
        ("terminal.tools=[bash]", "write one that says what ends the work"),
        ("renderer.which_calls=best", "use one of first, last"),
        ("objective.policy.max_staleness=-1", "use 0 or more"),
        ("objective.policy.length_penalty.max_penalty=0", "use >= 0, >= 0 and > 0"),
        ("terminal.command_timeout_s=0", "command_timeout_s=0"),
        ("objective.policy_coeff=-1", "policy_coeff=-1"),
        ("engine.learning_rate=-1", "learning_rate=-1"),
    ],
)
def test_a_wrong_setting_is_told_what_to_type_instead(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("triage", [override])
    assert said in str(caught.value)


def test_group_size_1_is_fine_without_the_policy_term() -> None:
    assert load_config("triage", ["group_size=1", "objective.policy_coeff=0"]).group_size == 1


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"presets are.*did you mean 'triage'"):
        load_config("triag")
    with pytest.raises(ConfigError, match="neither a YAML file nor a preset"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds a list, not settings"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="is a study, not a run"):
        load_config("demo")


def test_defaults_are_valid() -> None:
    assert TrainConfig().steps > 0


def test_a_file_that_is_no_text_and_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml is not YAML.*UTF-8"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="without an end"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks.source={name: openenv:x, options: {seed: 3}}", "did you mean 'tasks.source.options.seeds'?"),
        ("tasks.source={name: awm:shop, options: {verifier: cod}}", "use one of code, sql; did you mean 'code'?"),
        ("tasks.source={name: triage, options: {seeds: 3}}", "'triage' takes no options"),
        ("tasks.source=[triage, {name: workbench, weigth: 2}]", "did you mean 'tasks.source.weight'?"),
        ("tasks.source=[{weight: 2}]", "tasks.source.0.name is missing"),
        ("tasks.source=[{name: triage, weight: 0}]", "use a number above 0"),
        ("objective.clip=[0.2]", "has 1 values, which is too few"),
        ("objective.clip=[0.2, 0.2, 0.2]", "has 3 values; write 2"),
        ("objective.world.weights=3", "is no mapping; write it as {name: value}"),
        ("objective.world_model_coeff={points: {early: 1}}", "objective.world_model_coeff.points.early"),
        ("sandbox=bubblewarp", "did you mean 'bubblewrap'?"),
        ("engine.model=[base]", "is not text"),
    ],
)
def test_what_lies_deeper_is_checked_when_it_is_read(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("triage", [override])
    assert said in str(caught.value)


def test_values_are_read_as_a_person_means_them(tmp_path: Path) -> None:
    engine = "engine: {model: 7, learning_rate: 1e-4, grad_clip_norm: .inf}"
    (tmp_path / "mine.yaml").write_text(f"{engine}\nrollout:\ntasks: {{source: 2024-01-01, levels: 3}}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.engine.model, config.engine.learning_rate, config.engine.grad_clip_norm) == ("7", 1e-4, math.inf)
    assert config.tasks.levels == (3,) and config.tasks.sources[0].name == "2024-01-01"
    assert config.rollout == TrainConfig().rollout
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("name", run_presets())
def test_an_editor_takes_every_preset_and_no_other_key(name: str) -> None:
    schema = Draft202012Validator(json_schema())
    tree = read_yaml(name)[0]
    assert [error.message for error in schema.iter_errors(tree)] == []
    for wrong in ({"stpes": 3}, {"engine": {"modle": "base"}}, {"steps": "many"}, {"sandbox": "docker"}):
        assert not schema.is_valid(tree | wrong)
    assert schema.is_valid({"objective": {"world_model_coeff": {"points": {"0": 0.1}}}})


def test_nan_is_no_number() -> None:
    with pytest.raises(ConfigError, match="temperature=nan is not a number"):
        load_config("triage", ["temperature=.nan"])
    with pytest.raises(ConfigError, match="command_timeout_s='nan' is not a number"):
        load_config("triage", ["terminal.command_timeout_s=nan"])


def test_echo_rl_and_dapo_penalties_of_length_can_be_written() -> None:
    echo_rl = ["objective.policy.length_penalty={per_1000_tokens: 0.01, free_tokens: 20000, max_penalty: .inf}"]
    dapo = {"objective.policy.length_penalty": {"per_1000_tokens": 0.25, "free_tokens": 16384}}
    for overrides in (echo_rl, dapo):
        config = load_config("triage", overrides)
        assert config.objective.policy.length_penalty.free_tokens in (20000, 16384)
        assert config_from_dict(config_to_dict(config)) == config


def test_every_setting_that_the_table_of_rollouts_names_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
    known = {key.rsplit(".", n)[0] for key in setting_schemas() for n in range(3)}  # groups of settings too
    answers = [line.split("|")[2] for line in text[text.index("## echo-rl") :].splitlines() if line.startswith("| `")]
    names = [name for answer in answers for name in re.findall(r"`((?:[a-z]+\.)+[a-z_0-9]+)`", answer)]
    assert len(answers) > 70 and len(names) > 30
    assert [name for name in names if name not in known] == []


def test_a_coefficient_may_be_a_schedule() -> None:
    override = "objective.world_model_coeff={shape: steps, points: {0: 0.1, 50: 0}}"
    config = load_config("triage", [override, "objective.world.weights={'tool:bash': 0.5}"])
    assert config.objective.world_model_coeff == Schedule({0: 0.1, 50: 0.0}, shape="steps")
    assert config.objective.world.weights == {"tool:bash": 0.5}
    assert config_from_dict(config_to_dict(config)) == config
    one_by_one = {"objective.world_model_coeff.points.0": 0.1, "objective.world_model_coeff.points.50": 0.0}
    assert load_config("triage", one_by_one).objective.world_model_coeff == Schedule({0: 0.1, 50: 0.0})
    with pytest.raises(ConfigError, match=r"world_model_coeff\.shap"):
        load_config("triage", ["objective.world_model_coeff={shap: steps, points: {0: 0.1}}"])


def test_a_coefficient_may_be_a_share() -> None:
    config = load_config("triage", ["objective.world_model_coeff={share: 0.2, max: 1e-1}"])
    assert config.objective.world_model_coeff == Share(0.2, max=0.1)
    assert config_from_dict(config_to_dict(config)) == config
    falls = load_config("triage", ["objective.world_model_coeff={share: {points: {0: 0.3, 100: 0}, shape: linear}}"])
    assert falls.objective.world_model_coeff == Share(Schedule({0: 0.3, 100: 0.0}))
    assert config_from_dict(config_to_dict(falls)) == falls


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{shar: 0.2}", r"'objective.world_model_coeff.shar'; did you mean 'objective.world_model_coeff.share'"),
        ("{share: 0.2, mx: 1}", r"coeff.mx'; did you mean 'objective.world_model_coeff.max'"),
        ("{share: high}", r"objective.world_model_coeff.share='high' is not a number"),
        ("{share: 1.5}", r"share=1.5 of world_model_coeff leaves nothing"),
        ("{share: {points: {4: 0.1}}}", r"schedule points are at steps \[4\]"),
    ],
)
def test_a_mistake_in_a_share_is_told_as_one(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("triage", [f"objective.world_model_coeff={value}"])

"""Score recorded rollouts at checkpoints: each token's log-probability, and what a model expected where it was wrong.

The scores lie beside what was scored, for the page and for whoever reads Parquet. Nothing that a training wrote
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backtalk.engines.base import Engine
from backtalk.engines.checkpoint import find_checkpoint
from backtalk.engines.choose import open_engine
from backtalk.errors import ConfigError, DataError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import longest_history, model_location
from backtalk.run.config import TrainConfig, config_from_dict
from backtalk.run.log import RunLog, read_trajectories
from backtalk.run.log.scores import add_scores, scores_beside
from backtalk.run.log.sources import read_rollouts, record_reader
from backtalk.trajectory import TokenRole, TokenScores, Trajectory

ALTERNATIVES = 5  # named where a token was not the likeliest


@dataclass(frozen=True, slots=True)
class Scored:
    """What was scored of one file with one checkpoint. ``env_ce`` is in nats a token of environment output."""

    what: str
    checkpoint: str
    rollouts: int
    env_ce: float | None
    env_tokens: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Text:
    """A file to score: of a step or an evaluation of a run, or any that `import` reads. ``run`` is its run's folder."""

    what: str
    path: Path
    scores: Path
    run: RunLog | None

    def read(self, renderer: Renderer) -> tuple[Sequence[Trajectory], tuple[str, ...]]:
        if self.run is not None:
            return read_trajectories(self.path), ()
        read = read_rollouts([self.path], record_reader(renderer.for_tools))
        return read.trajectories, tuple(f"{refusal.where}: {refusal.reason}" for refusal in read.refusals)


async def score(
    paths: Sequence[Path],
    checkpoints: Sequence[str] = (),
    *,
    steps: Sequence[int] = (),
    every_step: bool = False,
    alternatives: int = ALTERNATIVES,
    on_scored: Callable[[Scored], None] = lambda scored: None,
) -> None:
    """Score run folders and files of trajectories with checkpoints: run folders, or models by name or folder.

    Without ``checkpoints``, one run is scored with the model that it began with and with its own checkpoint. Of a run
    the last training step and the last evaluation are scored, or ``steps``, or every one.

    Raises:
        ConfigError: nothing says which checkpoints; or one has another tokenizer than what it should score.
        DataError: a folder holds nothing to score or no checkpoint; a file cannot be read; a history is too long.
    """
    texts = [text for path in paths for text in _texts(path, steps, every_step)]
    for name, config, checkpoint in [_policy(given) for given in checkpoints or _before_and_after(paths)]:
        engine = open_engine(config.engine, seed=config.seed)
        if checkpoint is not None:
            engine.load(checkpoint)
            name = f"{name} after {engine.policy_version} steps"
        tokens_of = str(getattr(config.engine, "tokenizer", None) or getattr(config.engine, "model", name))
        renderer = Renderer(engine.tokenizer, (), RendererConfig(on_drift="fork"))
        for text in texts:
            trajectories, refused = text.read(renderer)
            _check(text, trajectories, engine, config, name)
            scores = await _score(engine, trajectories, alternatives)
            add_scores(text.scores, name, tokens_of, trajectories, scores)
            on_scored(_summary(text, name, trajectories, scores, refused))


async def _score(engine: Any, trajectories: Sequence[Trajectory], alternatives: int) -> list[TokenScores]:
    """Return the scores, with alternatives where the engine names them."""
    if not trajectories:
        return []
    if hasattr(engine, "score_tokens") and alternatives > 0:
        return await engine.score_tokens(trajectories, alternatives)
    return [TokenScores(tuple(logprobs)) for logprobs in await engine.score(trajectories)]


def _texts(path: Path, steps: Sequence[int], every_step: bool) -> Iterator[_Text]:
    if found := RunLog.of_groups(path):
        log, step = found
        yield _Text(f"{log.folder.name}, training step {step}", path, log.scores_path(step), log)
    elif (path / "config.yaml").is_file():
        yield from _of_run(RunLog(path), steps, every_step)
    elif not path.exists():
        raise DataError(f"{path} does not exist; pass a run folder, or a file of trajectories")
    else:
        yield _Text(path.name, path, scores_beside(path), None)


def _of_run(log: RunLog, steps: Sequence[int], every_step: bool) -> Iterator[_Text]:
    name, trained = log.folder.resolve().name, log.group_steps()
    evaluated = [s for s in log.evaluation_steps() if log.evaluation_path(s).with_suffix(".parquet").is_file()]
    if not trained and not evaluated:
        raise DataError(f"{log.folder} has no rollouts yet; wait for the first step")
    if missing := set(steps) - {*trained, *evaluated}:
        raise DataError(f"{log.folder} has no step {min(missing)}; there are {min(trained)} to {max(trained)}")

    def wanted(known: list[int]) -> list[int]:
        return [step for step in known if step in steps] if steps else known if every_step else known[-1:]

    for step in wanted(trained):
        yield _Text(f"{name}, training step {step}", log.groups_path(step), log.scores_path(step), log)
    for step in wanted(evaluated):
        path, scores = log.evaluation_path(step).with_suffix(".parquet"), log.scores_path(step, evaluation=True)
        yield _Text(f"{name}, evaluation before step {step}", path, scores, log)


def _before_and_after(paths: Sequence[Path]) -> list[str]:
    folders = [path for path in paths if (path / "config.yaml").is_file()]
    if len(paths) != 1 or len(folders) != 1:
        raise ConfigError("nothing says which models to score with; give --checkpoint RUN or --checkpoint MODEL")
    return [str(RunLog(folders[0]).read_config()["engine"]["model"]), str(folders[0])]


def _policy(given: str) -> tuple[str, TrainConfig, Path | None]:
    """Return a checkpoint's name, the settings that open it, and its folder; for a model no folder."""
    if not (Path(given) / "config.yaml").is_file():
        folder = Path(given).expanduser()
        return (
            folder.resolve().name if folder.is_dir() else given,
            config_from_dict({}, [f"engine.model={given}"]),
            None,
        )
    log = RunLog(given)
    checkpoint = find_checkpoint(log.checkpoint_path)
    if checkpoint is None:
        raise DataError(f"{given} has no checkpoint yet; wait for one, or score with the model that it began with")
    return log.folder.resolve().name, config_from_dict(log.read_config()), checkpoint


def _check(text: _Text, trajectories: Sequence[Trajectory], engine: Engine, config: TrainConfig, name: str) -> None:
    """Raise where the tokens are of another tokenizer, or a history is longer than the model's positions."""
    backend = engine.tokenizer.backend_tokenizer
    if text.run is not None and (tokenizer := text.run.tokenizer_path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        if Tokenizer.from_file(str(tokenizer)).get_vocab() != backend.get_vocab():
            raise ConfigError(
                f"{name} has another tokenizer than {text.run.folder}, so its tokens mean other text there; score with "
                "a checkpoint of the same model, or of one with the same tokenizer"
            )
    size = backend.get_vocab_size(with_added_tokens=True)
    if (highest := max((token for t in trajectories for token in t.token_ids), default=0)) >= size:
        raise ConfigError(f"{text.path} holds token {highest}, and {name} has only {size}; it is of another model")
    model = getattr(config.engine, "model", None)
    longest = longest_history(model_location(model)) if config.engine.kind == "torch" and model else None
    longest_branch = max((sum(map(len, branch)) for t in trajectories for branch in t.branches), default=0)
    if longest is not None and longest_branch > longest:
        raise DataError(
            f"{text.path} holds a history of {longest_branch} tokens, and {name} has positions for {longest}; score it "
            "with a model of a longer context"
        )


def _summary(
    text: _Text, name: str, trajectories: Sequence[Trajectory], scores: Sequence[TokenScores], refused: tuple[str, ...]
) -> Scored:
    nats = [
        -x
        for trajectory, row in zip(trajectories, scores, strict=True)
        for x, role in zip(row.logprobs, trajectory.roles, strict=True)
        if role is TokenRole.ENV_OUTPUT
    ]
    return Scored(text.what, name, len(trajectories), sum(nats) / len(nats) if nats else None, len(nats), refused)

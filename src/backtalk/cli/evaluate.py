"""`backtalk evaluate`: evaluate a policy on held-out tasks of its run, or on a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backtalk.cli.interrupts import run
from backtalk.cli.options import (
    HostPackages,
    OnRefuseChoice,
    OptionalRunFolder,
    Settings,
    new_console,
    on_refuse_choice,
    policy_settings,
)
from backtalk.errors import ConfigError
from backtalk.files import write_bytes

if TYPE_CHECKING:
    from backtalk.run.benchmark import Benchmark
    from backtalk.run.config import TrainConfig


WorldModelChoice = Annotated[
    bool, typer.Option("--world-model", help="Also measure what it knows of its world; written into the run.")
]


def evaluate(
    folder: OptionalRunFolder = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="How many tasks.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Rollouts of each, the k of pass@k.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Measure the model that the run began with.")] = False,
    world_model: WorldModelChoice = False,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="A folder of Harbor tasks, or name@version: terminal-bench@2.0."),
    ] = None,
    environment: Annotated[
        str, typer.Option(help="Where a dataset is played: local, or an environment of Harbor's, such as docker.")
    ] = "local",
    names: Annotated[
        list[str] | None, typer.Option("--task", metavar="PATTERN", help="Tasks of a dataset; may be given many times.")
    ] = None,
    host_packages: HostPackages = False,
    on_refuse: OnRefuseChoice = "stop",
    model: Annotated[str | None, typer.Option(help="Measure this model instead of a run's.")] = None,
    settings: Settings = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all of it to this file.")] = None,
    trajectories: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Also write every rollout of a dataset to this file.")
    ] = None,
) -> None:
    """Measure the policy of a run on held-out tasks: pass@1, pass@k, cross-entropy, each with its 95 % interval.

    With --dataset, on tasks that others wrote, five rollouts each: `backtalk evaluate runs/mine --dataset my_tasks`, or
    `backtalk evaluate --model Qwen/Qwen3-8B --dataset terminal-bench@2.0 --environment docker`.
    """
    if dataset is not None and world_model:
        raise ConfigError("--world-model is about the held-out tasks of a RUN; leave --dataset out, or --world-model")
    if dataset is not None:
        config, checkpoint = policy_settings(folder, model, base, list(settings or []))
        from backtalk.run.benchmark import Benchmark

        benchmark = Benchmark(
            dataset=dataset,
            environment=environment,
            samples_per_task=samples or 5,
            names=tuple(names or ()),
            count=tasks,
            host_packages=host_packages,
            on_refuse=on_refuse_choice(on_refuse),
        )
        result = _on_dataset(config, benchmark, checkpoint, trajectories)
    elif host_packages or on_refuse != "stop":
        raise ConfigError(
            "--host-packages and --on-refuse are about the tasks of a --dataset; those of a run are read as its "
            "settings say (host_packages, on_refuse of a source)"
        )
    elif folder is None:
        raise ConfigError("nothing says what to measure; name a RUN, or a --dataset with a RUN or a --model")
    elif model is not None:
        raise ConfigError(f"got {folder} and --model {model}, but no --dataset; give --dataset, or leave --model out")
    else:
        result = _on_held_out(folder, base, tasks, samples, settings, world_model)
    if json_path is not None:
        write_bytes(json_path, json.dumps(result, indent=1).encode())


def _on_held_out(
    folder: Path, base: bool, tasks: int | None, samples: int | None, settings: list[str] | None, world_model: bool
) -> dict[str, Any]:
    overrides = [*(settings or []), *(["evaluation.world_model=true"] if world_model else [])]
    overrides += [f"evaluation.tasks={tasks}"] if tasks else []
    overrides += [f"evaluation.samples_per_task={samples}"] if samples else []
    policy_settings(folder, None, base, overrides)  # a mistake is found before PyTorch is loaded
    from backtalk.cli.progress import RunDisplay, evaluation_table
    from backtalk.run.train import evaluate_run

    console = new_console()
    with RunDisplay(console) as display:
        evaluation = run(evaluate_run(folder, overrides=overrides, base=base, on_event=display.show))
    console.print(evaluation_table(evaluation))
    return evaluation.to_dict()


def _on_dataset(
    config: TrainConfig, benchmark: Benchmark, checkpoint: Path | None, trajectories: Path | None
) -> dict[str, Any]:
    from backtalk.cli.progress import RunDisplay, benchmark_table, evaluation_table
    from backtalk.run.benchmark import run_benchmark
    from backtalk.run.log import write_trajectories

    console = new_console()
    with RunDisplay(console) as display:
        result, groups = run(run_benchmark(config, benchmark, checkpoint=checkpoint, on_event=display.show))
    console.print(benchmark_table(result, benchmark.dataset))
    console.print(evaluation_table(result.evaluation))
    if trajectories is not None:
        write_trajectories(trajectories, [trajectory for group in groups for trajectory in group])
    return result.to_dict()

"""One picture of memory and time by model and length: as predicted and as measured."""

from __future__ import annotations

from gpu_check.results import FAILED, Results, Row


def draw(results: Results) -> None:
    """Draw the steps of the part `speed` into gpu_check.png, if there are any."""
    steps: dict[str, list[tuple[int, Row]]] = {}
    for name, row in results.parts.get("speed", {}).items():
        kind, _, rest = name.partition(", ")
        if kind == "step" and FAILED not in row and "naive" not in rest:
            shape, _, length = rest.partition(", ")
            steps.setdefault(shape, []).append((int(length.split()[0]), row))
    if not steps:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for number, (shape, points) in enumerate(steps.items()):
        lengths = [length for length, _ in points]
        for axis, column, style in (
            (memory, "memory GiB", "o-"),
            (memory, "predicted GiB", "x--"),
            (speed, "tokens/s", "o-"),
        ):
            label = f"{shape}{', predicted' if 'predicted' in column else ''}"
            axis.plot(lengths, [row[column] for _, row in points], style, color=f"C{number}", label=label)
    for axis, title in ((memory, "largest memory of a step, GiB"), (speed, "tokens a second")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens of a rollout")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    memory.legend(fontsize=7)
    figure.suptitle(str(results.about["device"]))
    figure.tight_layout()
    figure.savefig(results.folder / "gpu_check.png", dpi=120)
    pyplot.close(figure)

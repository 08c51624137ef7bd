"""Check and measure the embedded engine on one device, in parts of a few minutes each.

    scripts/gpu_check                       # all parts on the first GPU
    scripts/gpu_check speed --out results   # one part; what results/gpu_check.json holds is not done again
    scripts/gpu_check --device cpu          # the same, smaller
    scripts/gpu_check kit kit               # fill a folder for a machine that can fetch nothing
    scripts/gpu_check --kit kit             # use it there

Writes gpu_check.json, a table gpu_check.md and a picture gpu_check.png into --out ($OUT, or runs/gpu_check/).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from pathlib import Path

PARTS = ("correctness", "speed", "sampling", "run")
SECONDS = 450.0
GRACE_S = 60.0  # that a part may overrun before the process ends with a traceback


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all), or kit FOLDER")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto is the first GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu_check")))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most seconds of a part")
    parser.add_argument("--model", help="folder of a small pretrained model, for `run`")
    parser.add_argument("--kit", type=Path, help="folder that `kit` filled")
    args = parser.parse_args()
    if args.parts[:1] == ["kit"] and len(args.parts) == 2:
        from gpu_check.kit import fill

        return fill(Path(args.parts[1]))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if args.kit is not None:
        sys.path.append(str(args.kit.resolve() / "site"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return check(args)


def check(args: argparse.Namespace) -> int:
    """Run the parts one by one; 1 if a measurement failed."""
    from backtalk.engines.torch.model import resolve_device
    from gpu_check.machine import Device
    from gpu_check.results import Part, Results

    device = Device(resolve_device(args.device))
    results = Results(args.out, device.about())
    print(f"{device.name}, results in {results.folder}", flush=True)
    for name in args.parts or PARTS:
        part = Part(results, name, args.seconds)
        faulthandler.dump_traceback_later(args.seconds + GRACE_S, exit=True)
        match name:
            case "correctness":
                from gpu_check.correctness import run

                run(part, device)
            case "speed":
                from gpu_check.picture import draw
                from gpu_check.speed import run

                run(part, device)
                draw(results)
            case "sampling":
                from gpu_check.sampling import run

                run(part, device)
            case _:
                from gpu_check.real_run import run

                run(part, device, args.model)
        faulthandler.cancel_dump_traceback_later()
        if part.not_reached:
            print(f"{name}: not reached: {', '.join(part.not_reached)}")
    print(f"\n{results.markdown()}")
    for failure in results.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return int(bool(results.failures))


if __name__ == "__main__":
    sys.exit(main())

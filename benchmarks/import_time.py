"""Measure how long `import backtalk` and the command line's first answer take, beside a bare Python.

    python benchmarks/import_time.py

Each number is the median of fresh processes, so the interpreter's own start is in it; the last column leaves it out.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 15
IMPORT_LIMIT_MS = 150.0
CASES = {
    "bare Python": "pass",
    "import backtalk": "import backtalk",
    "import backtalk.cli": "import backtalk.cli",
}


def median_ms(code: str) -> float:
    """Return the median wall time of a fresh Python that runs ``code``, in milliseconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def main() -> int:
    bare = median_ms(CASES["bare Python"])
    own = {}
    print(f"{'':22}{'median ms':>12}{'own ms':>10}")
    for name, code in CASES.items():
        median = median_ms(code)
        own[name] = median - bare
        print(f"{name:22}{median:12.1f}{own[name]:10.1f}")
    return int(own["import backtalk"] > IMPORT_LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())

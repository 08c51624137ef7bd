"""A folder for a machine that can fetch nothing: packages that it may lack, and bubblewrap."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

# What a run needs besides PyTorch and transformers; the others come with those or are common.
PACKAGES = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "tomli-w")
PYTHON = "3.12"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")


def fill(folder: Path) -> int:
    """Put the packages of this environment's versions, for Python 3.12 on x86-64, into site/, and bwrap beside it."""
    wanted = [f"{name}=={metadata.version(name)}" for name in PACKAGES]
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *options, *platforms, "-d", wheels, *wanted], check=True
        )
        for wheel in sorted(Path(wheels).glob("*.whl")):
            ZipFile(wheel).extractall(folder / "site")
    if found := shutil.which("bwrap"):
        shutil.copy(found, folder / "bwrap")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {', '.join(wanted)}{', bwrap' if found else ''}; {size / 2**20:.1f} MiB")
    print(f"there: install {folder}/bwrap /usr/local/bin/ && scripts/gpu_check --kit {folder}")
    return 0

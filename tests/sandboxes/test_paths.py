"""Paths of files in sandboxes: one rule for tasks, archives, and what is put and got."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.files import clean_path
from backtalk.tasks.rows import read_row_file


@pytest.mark.parametrize("path", ["", ".", "a/", "../a", "a/../../b", "a\0b"])
def test_one_rule_for_paths_of_files(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="no plain path of a file"):
        clean_path(path, relative=True)
    with pytest.raises(ConfigError, match="no plain path of a file"):
        clean_path(f"/{path}")
    row = {"id": "a", "instruction": "Do it.", "tests": {"test.sh": "echo 1", path: "x"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match=r"line 1: tests: .* no plain path of a file"):
        read_row_file(tmp_path / "rows.jsonl")


def test_paths_without_detours() -> None:
    assert [clean_path(path) for path in ("/a//./b", "//a", "/a..b/.c")] == ["/a/b", "/a", "/a..b/.c"]
    assert clean_path("./a//b", relative=True) == "a/b"
    with pytest.raises(ConfigError, match="is absolute"):
        clean_path("/a", relative=True)
    with pytest.raises(ConfigError, match="write it as /home/agent/a"):
        clean_path("a")

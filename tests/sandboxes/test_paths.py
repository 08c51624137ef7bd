"""Paths of files in sandboxes, by one rule for tasks, archives, put and get; and the removal of folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.files import clean_path, remove_tree
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


def test_a_folder_is_removed_whatever_an_agent_made_of_it(tmp_path: Path) -> None:
    folder, beside = tmp_path / "tree", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    (beside / "file").touch()
    beside.chmod(0o500)
    (folder / "link").symlink_to(beside)
    (folder / "shut/in").mkdir(parents=True)
    (folder / "shut").chmod(0)
    deepest = os.open(folder, os.O_RDONLY)
    for _ in range(1100):  # deeper than Python recurses
        os.mkdir("d", dir_fd=deepest)
        above, deepest = deepest, os.open("d", os.O_RDONLY, dir_fd=deepest)
        os.close(above)
    os.close(deepest)
    remove_tree(folder)
    remove_tree(folder)  # that is gone already
    assert not folder.exists()
    assert (beside / "file").exists() and beside.stat().st_mode & 0o777 == 0o500

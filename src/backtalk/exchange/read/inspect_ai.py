"""Read logs of inspect_ai: ``.eval`` (a zip with a file a sample) and ``.json``, or one sample of either.

Read against inspect_ai 0.3. A sample's first score is the reward; a sample that broke has none.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, mapping, required
from backtalk.exchange.read.conversation import Conversation, about_of, kept_messages
from backtalk.exchange.read.spellings import chat_messages
from backtalk.files import reading
from backtalk.trajectory import Failure, StopReason

_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0, "yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
_LIMITS = {"message": StopReason.MAX_TURNS, "turn": StopReason.MAX_TURNS, "token": StopReason.MAX_TOKENS}
_ZSTD = 93


def read_inspect(sample: Mapping[str, Any], name: str) -> Conversation:
    """Return the conversation of one sample.

    Raises:
        DataError: a message, or a score, that cannot be read.
    """
    attachments = mapping(sample.get("attachments") or {}, "attachments")
    raw = _attached(required(sample, "a sample", "messages"), attachments)
    task = first_of(sample, "eval_task")
    about = about_of({} if "id" in sample else sample, {}, name)
    if "id" in sample:
        about = replace(about, task_id=f"{task}/{sample['id']}" if task else str(sample["id"]))
    about = replace(about, messages=kept_messages(raw), **_scored(sample.get("scores") or {}))
    limit = mapping(sample.get("limit") or {}, "limit").get("type")
    if limit:
        about = replace(about, stop_reason=_LIMITS.get(str(limit), StopReason.DEADLINE))
    if sample.get("error"):
        why = mapping(sample["error"], "the error").get("message")
        about = replace(about, failure=Failure("step", "SampleError", str(why)))
    return Conversation(messages=chat_messages(raw), about=about)


def samples_of(log: Mapping[str, Any]) -> list[Any]:
    """Return the samples of a log, each with the name of its task; the record itself where it is a sample.

    Raises:
        DataError: the log has no samples, because the eval did not get to one.
    """
    if "eval" not in log:
        return [log]
    task = mapping(log["eval"], "eval").get("task")
    samples = log.get("samples")
    if not samples:
        raise DataError(f"the log of {task!r} has no samples (status {log.get('status')!r}); there is nothing to read")
    return [{**mapping(sample, f"sample {i}"), "eval_task": task} for i, sample in enumerate(samples)]


def read_eval(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the samples of an ``.eval`` file, each after its place, with the name of the task.

    Raises:
        DataError: it is no zip file, or has no sample.
    """
    with reading(path):
        try:
            with zipfile.ZipFile(path) as archive:
                files = {info.filename: info for info in archive.infolist()}
                header = files.get("header.json") or files.get("_journal/start.json")
                task = (json.loads(_content(path, archive, header)).get("eval") or {}).get("task") if header else None
                names = [name for name in files if re.fullmatch(r"samples/.*\.json", name)]
                for name in sorted(names):
                    place = f"{path}:{name}"
                    try:
                        sample = json.loads(_content(path, archive, files[name]))
                        yield place, {**mapping(sample, "a sample"), "eval_task": task}
                    except (ValueError, DataError) as error:
                        yield place, DataError(f"{place} cannot be read ({error})")
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is no .eval file, which is a zip ({error}); copy it again") from error
    if not names:
        raise DataError(f"{path} has no samples; the eval did not finish one")


def _content(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a file's content; zip's Zstandard, which inspect_ai writes, is newer than Python's own reader."""
    if info.compress_type != _ZSTD:
        return archive.read(info)
    import pyarrow as pa

    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, 1)
        packed = file.read(info.compress_size)
    try:
        return pa.decompress(packed, decompressed_size=info.file_size, codec="zstd", asbytes=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{info.filename} is damaged ({error})") from error


def _attached(value: Any, attachments: Mapping[str, Any]) -> Any:
    """Return a value with the long texts that a log keeps apart put back."""
    if isinstance(value, str):
        return re.sub(r"attachment://(\w+)", lambda m: str(attachments.get(m[1], m[0])), value)
    if isinstance(value, Mapping):
        return {name: _attached(inner, attachments) for name, inner in value.items()}
    return [_attached(inner, attachments) for inner in value] if isinstance(value, (list, tuple)) else value


def _scored(scores: Any) -> dict[str, Any]:
    """Return the first score as the reward, and all of them as stats."""
    found = {name: _value(mapping(score, f"score {name}").get("value"), name) for name, score in scores.items()}
    known = {name: value for name, value in found.items() if value is not None}
    reward = next(iter(found.values()), None)
    return {
        "reward": reward,
        "stats": {f"score_{name}": value for name, value in known.items()} if len(found) > 1 else {},
    }


def _value(value: Any, name: str) -> float | None:
    """Return a score as a number: C, I, P and N as inspect_ai takes them; None for one that was not given."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, Mapping) and len(value) == 1:
        return _value(next(iter(value.values())), name)
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    try:
        return float(str(value))
    except ValueError:
        raise DataError(f"score {name!r} is {value!r}, which is no number and none of C, I, P and N") from None

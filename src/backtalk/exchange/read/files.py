"""Read files of other libraries' records as trajectories, record by record: a broken one costs only itself."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from backtalk.errors import BacktalkError, ConfigError, DataError
from backtalk.exchange.detect import Format
from backtalk.exchange.plain import first_of, mapping, parsed, plain, reward_of
from backtalk.exchange.read.atif import trajectory_from_atif
from backtalk.exchange.read.chat import openai_messages, trajectory_from_chat
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.openenv import trajectory_from_openenv
from backtalk.exchange.read.trl import rows_of, trajectory_from_trl
from backtalk.exchange.read.turns import About, trajectory_from_turns, turns_of
from backtalk.exchange.read.verifiers import trajectory_from_trace
from backtalk.exchange.read.wrappers import NO_WRAPPERS, TERMINUS, Wrappers
from backtalk.exchange.rfc010 import from_rfc010
from backtalk.files import reading
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolSpec
from backtalk.parquet import parquet_rows
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory

RendererOf = Callable[[Sequence[ToolSpec]], Renderer]  # the same tokenizer with the tools that a record lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Choices about reading records.

    With ``wrappers`` None those of the harness that wrote the record are taken, where it is known. ``max_tokens`` cuts
    a trajectory after the last whole turn that fits.
    """

    on_drift: Literal["stop", "fork"] = "stop"
    observation_role: TokenRole | None = None
    user_role: TokenRole = TokenRole.CONTEXT
    wrappers: Wrappers | None = None
    keep_reasoning: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that was not imported."""

    where: str  # file and line
    reason: str


@dataclass(frozen=True, slots=True)
class Imported:
    """Trajectories of some files, and the records that were refused."""

    trajectories: tuple[Trajectory, ...]
    refusals: tuple[Refusal, ...]

    def tokens(self) -> dict[TokenRole, int]:
        """Return the number of tokens of each role."""
        return {role: sum(trajectory.count(role) for trajectory in self.trajectories) for role in TokenRole}

    def total(self, stat: str) -> int:
        """Return the sum of one of the trajectories' ``stats``."""
        return int(sum(trajectory.stats.get(stat, 0) for trajectory in self.trajectories))


def import_files(
    paths: Sequence[Path],
    source: Format,
    renderer_of: RendererOf | None = None,
    options: ImportOptions = ImportOptions(),
    longest: int | None = None,
) -> Imported:
    """Import .json, .jsonl (each also as .gz) and .parquet files, one record a line or row.

    Trajectories of one task come together, in the order in which tasks first came up. ``longest`` is the most tokens
    that a sequence may have, the model's context; longer ones are refused.

    Raises:
        ConfigError: an unknown format.
        DataError: a file cannot be read at all.
    """
    if source not in get_args(Format):
        raise ConfigError(f"format {source!r} is unknown; use {', '.join(get_args(Format))}")

    def read(record: Any, place: str) -> Iterator[Trajectory]:
        for row in rows_of(record) if source == "trl" else [record]:
            yield _fitting(import_record(row, source, renderer_of, options, name=place), options, longest)

    imported = collect((pair for path in paths for pair in read_records(path)), read)
    tasks = dict.fromkeys(trajectory.task_id for trajectory in imported.trajectories)
    order = {task_id: number for number, task_id in enumerate(tasks)}
    return replace(imported, trajectories=tuple(sorted(imported.trajectories, key=lambda t: order[t.task_id])))


def collect(records: Iterable[tuple[str, Any]], read: Callable[[Any, str], Iterator[Trajectory]]) -> Imported:
    """Return the trajectories that ``read`` makes of records, with their index within the task.

    ``records`` are pairs of a place and a record. A record that cannot be read is refused and costs only itself.
    """
    found: list[Trajectory] = []
    refusals: list[Refusal] = []
    counts: Counter[str] = Counter()
    for place, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            for trajectory in read(record, place):
                ours = isinstance(record, Trajectory)
                found.append(trajectory if ours else replace(trajectory, sample_index=counts[trajectory.task_id]))
                counts[trajectory.task_id] += 1
        except (BacktalkError, ValueError) as error:  # a Trajectory raises ValueError
            refusals.append(Refusal(place, str(error)))
        except (TypeError, KeyError, IndexError, AttributeError) as error:  # foreign data, of some other shape
            reason = f"this is not what a record of this format looks like ({type(error).__name__}: {error})"
            refusals.append(Refusal(place, reason))
    return Imported(tuple(found), tuple(refusals))


def import_record(
    record: Any,
    source: Format,
    renderer_of: RendererOf | None = None,
    options: ImportOptions = ImportOptions(),
    *,
    name: str = "imported",
) -> Trajectory:
    """Return the trajectory of one record. ``name`` is the task id of a record that has none.

    Raises:
        DataError: the record is not of that format, or is damaged; the message says where.
        RenderError: the chat template cannot write it.
    """
    outer = plain(record)
    if source == "rfc010":
        return from_rfc010(mapping(outer, "a record of RFC 010"), task_id=name)
    inner = outer
    if source == "atif" and isinstance(outer, Mapping) and "trajectory" in outer:
        inner = mapping(outer["trajectory"], "the trajectory")
    about = about_of(outer, inner, name)
    observations = Observations(
        renderer=None if renderer_of is None else renderer_of(_tools(outer, inner)),
        role=options.observation_role,
        user_role=options.user_role,
        wrappers=_wrappers(inner) if options.wrappers is None else options.wrappers,
        on_drift=options.on_drift,
        keep_reasoning=options.keep_reasoning,
    )
    match source:
        case "chat":
            messages = outer if isinstance(outer, (list, tuple)) else parsed(outer.get("messages"), "messages")
            if not isinstance(messages, (list, tuple)):
                raise DataError("a chat record is a list of messages, or has them under 'messages'")
            return trajectory_from_chat(openai_messages(messages), about, observations)
        case "atif":
            return trajectory_from_atif(inner, about, observations)
        case "turns":
            return trajectory_from_turns(turns_of(_main_detail(outer)), about, observations)
        case "trl":
            return trajectory_from_trl(outer, about, observations)
        case "verifiers":
            return trajectory_from_trace(outer, about, observations)
        case "openenv":
            return trajectory_from_openenv(outer, about, observations)


def _main_detail(record: Any) -> Any:
    """Return the only one of Harbor's RolloutDetails, or the record itself where it has none."""
    details = first_of(record, "rollout_details") if isinstance(record, Mapping) else None
    if details is None:
        return record
    if len(details) != 1:
        raise DataError(
            f"rollout_details holds {len(details)} histories and only one can be imported; pass them one by one"
        )
    return details[0]


def about_of(outer: Any, inner: Any, name: str) -> About:
    """Return a record's facts beside its tokens; ``inner`` is the document inside it, or the record itself."""
    if not isinstance(outer, Mapping):
        return About(task_id=name)
    task = first_of(outer, "task_id", "task", "scenario")
    task = first_of(task, "key", "id", "name", "type") if isinstance(task, Mapping) else task
    task = first_of(outer, "episode_id", "trajectory_id", "session_id", "id") if task is None else task
    if outer.get("scenario") is not None and outer.get("task_idx") is not None:
        task = f"{outer['scenario']}/{outer['task_idx']}"
    messages = first_of(inner, "messages", "steps") or ()
    kept = tuple(dict(m) for m in messages if isinstance(m, Mapping))
    reward = None if "rewards" in outer else reward_of(outer)
    return About(task_id=name if task is None else str(task), reward=reward, messages=kept)


def _tools(outer: Any, inner: Any) -> tuple[ToolSpec, ...]:
    """Return the tools that a record lists in OpenAI's format; names alone say too little to render."""
    listed: Any = ()
    if isinstance(inner, Mapping):
        agent = inner.get("agent")
        listed = agent.get("tool_definitions") if isinstance(agent, Mapping) else first_of(outer, "tools")
    tools = []
    for tool in parsed(listed, "tools") or ():
        function = first_of(tool, "function") or tool if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
            tools.append(
                ToolSpec(str(function["name"]), str(function.get("description") or ""), function["parameters"])
            )
    return tuple(tools)


def _wrappers(record: Any) -> Wrappers:
    agent = record.get("agent") if isinstance(record, Mapping) else None
    name = agent.get("name") if isinstance(agent, Mapping) else None
    return TERMINUS if "terminus" in str(name).lower() else NO_WRAPPERS


def _fitting(trajectory: Trajectory, options: ImportOptions, longest: int | None) -> Trajectory:
    if options.max_tokens is not None:
        trajectory = cut_to(trajectory, options.max_tokens)
    length = max(sum(len(segment) for segment in branch) for branch in trajectory.branches)
    if longest is not None and length > longest:
        raise DataError(
            f"{length} tokens, and the model's context holds {longest}; --max-tokens {longest} keeps the turns that fit"
        )
    return trajectory


def cut_to(trajectory: Trajectory, max_tokens: int) -> Trajectory:
    """Return each branch up to the last whole turn that fits; ``stats["cut_tokens"]`` says how much is gone.

    Raises:
        DataError: not even the first turn fits.
    """
    kept: list[Segment] = []
    for branch in trajectory.branches:
        length, end = 0, 0
        for i, segment in enumerate(branch):
            length += len(segment)
            following = branch[i + 1] if i + 1 < len(branch) else None
            border = following is None or (following.turn != segment.turn and segment.turn is not None)
            if length <= max_tokens and border:
                end = i + 1
        number = kept[-1].branch + 1 if kept else 0
        kept += [replace(segment, branch=number) for segment in branch[:end]]
    gone = len(trajectory) - sum(map(len, kept))
    if not gone:
        return trajectory
    if not kept:
        raise DataError(f"prompt and first turn are longer than --max-tokens {max_tokens}; nothing is left to keep")
    reason = trajectory.stop_reason if trajectory.failure else StopReason.MAX_TOKENS
    short = replace(trajectory, segments=tuple(kept), stop_reason=reason)
    return replace(short, stats={**trajectory.stats, "cut_tokens": float(gone), "num_turns": float(short.num_turns)})


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a file after its place; a DataError instead of one that cannot be read.

    Raises:
        DataError: the file cannot be read, or its name ends in no known way.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(parquet_rows(path)))
        return
    if not name.endswith((".jsonl", ".json")):
        raise DataError(f"{path} is neither .json, .jsonl, .parquet nor one of them with .gz; rename or convert it")
    with reading(path):
        content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}); copy it again") from error
    if name.endswith(".json"):
        yield from _json_records(path, content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _json(line, place)


def _json_records(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the record or the list of records of a file; a list of messages is one record."""
    data = _json(content, str(path))
    many = isinstance(data, list) and all(isinstance(x, (dict, list)) and "role" not in x for x in data)
    if not many:
        yield str(path), data
        return
    for number, record in enumerate(data):
        yield f"{path}[{number}]", record


def _json(content: bytes, place: str) -> Any:
    """Return the value, or the error to refuse it with."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return DataError(f"{place} is not JSON ({error})")

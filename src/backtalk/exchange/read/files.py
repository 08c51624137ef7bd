"""Read files of other libraries' records as trajectories, record by record: a broken one costs only itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from backtalk.errors import BacktalkError, ConfigError, DataError
from backtalk.exchange.detect import Format, guess_format
from backtalk.exchange.logged import messages_in
from backtalk.exchange.plain import first_of, mapping, parsed, plain, unpacked
from backtalk.exchange.read.atif import trajectory_from_atif
from backtalk.exchange.read.batches import rllm_trajectories, skyrl_rows
from backtalk.exchange.read.chat import trajectory_from_chat
from backtalk.exchange.read.conversation import Conversation, about_of
from backtalk.exchange.read.harbor import about_trial
from backtalk.exchange.read.inspect_ai import read_inspect, samples_of
from backtalk.exchange.read.observations import DEFAULTS, Observations
from backtalk.exchange.read.openenv import trajectory_from_openenv
from backtalk.exchange.read.openhands import read_openhands
from backtalk.exchange.read.records import read_records
from backtalk.exchange.read.spellings import chat_messages
from backtalk.exchange.read.swe_agent import read_mini_swe_agent, read_swe_agent
from backtalk.exchange.read.trl import rows_of as trl_rows
from backtalk.exchange.read.trl import trajectory_from_trl
from backtalk.exchange.read.turns import trajectory_from_turns, turns_of
from backtalk.exchange.read.verifiers import read_result, trajectory_from_trace
from backtalk.exchange.read.wrappers import MINI_SWE_AGENT, NO_WRAPPERS, SWE_AGENT, TERMINUS, Wrappers, find_wrappers
from backtalk.exchange.rfc010 import from_rfc010
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolSpec
from backtalk.trajectory import Segment, StopReason, Trajectory

T = TypeVar("T")
RendererOf = Callable[[Sequence[ToolSpec]], Renderer]  # the same tokenizer with the tools that a record lists


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

    def total(self, stat: str) -> int:
        """Return the sum of one of the trajectories' ``stats``."""
        return int(sum(trajectory.stats.get(stat, 0) for trajectory in self.trajectories))


def import_files(
    paths: Sequence[Path],
    source: Format | None = None,
    renderer_of: RendererOf | None = None,
    options: Observations = DEFAULTS,
    longest: int | None = None,
    *,
    for_text: RendererOf | None = None,
) -> Imported:
    """Import files, see records.read_records. Without ``source`` the format of each record is detected.

    Trajectories of one task come together, in the order in which tasks first came up. ``longest`` is the most tokens
    that a sequence may have, the model's context; longer ones are refused. ``for_text`` renders messages where there is
    no ``renderer_of``, which records of token ids do without.

    Raises:
        ConfigError: an unknown format.
        DataError: a file cannot be read at all.
    """
    if source is not None and source not in get_args(Format):
        raise ConfigError(f"format {source!r} is unknown; use {', '.join(get_args(Format))}")

    def read(rollout: Rollout) -> Trajectory:
        made_with = renderer_of or (for_text if is_text(rollout) else None)
        trajectory = import_record(rollout.record, rollout.source, made_with, options, name=rollout.file)
        return _fitting(trajectory, options, longest)

    imported = collect((pair for path in paths for pair in read_records(path)), read, source)
    tasks = dict.fromkeys(trajectory.task_id for trajectory in imported.trajectories)
    order = {task_id: number for number, task_id in enumerate(tasks)}
    return replace(imported, trajectories=tuple(sorted(imported.trajectories, key=lambda t: order[t.task_id])))


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout of a record, which may hold several, not read yet; ``file`` is the place of the record.

    A trajectory of ours has no ``source``.
    """

    record: Any
    source: Format | None
    file: str


def collect(
    records: Iterable[tuple[str, Any]], read: Callable[[Rollout], Trajectory], source: Format | None = None
) -> Imported:
    """Return the trajectories that ``read`` makes of records, with their index within the task.

    ``records`` are pairs of a place and a record; a trajectory of ours stays as it is. A rollout that cannot be read is
    refused and costs only itself. Without ``source`` the format of each record is detected.
    """
    found: list[Trajectory] = []
    refusals: list[Refusal] = []
    counts: Counter[str] = Counter()

    def take(place: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (BacktalkError, ValueError) as error:  # a Trajectory raises ValueError
            refusals.append(Refusal(place, str(error)))
        except (TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:  # of some other shape
            reason = f"this is not what a record of this format looks like ({type(error).__name__}: {error})"
            refusals.append(Refusal(place, reason))

    for place, record in records:
        rollouts = take(place, partial(_rollouts, record, place, source)) or []
        for number, rollout in enumerate(rollouts):
            where = place if len(rollouts) == 1 else f"{place}, rollout {number}"
            if (trajectory := take(where, partial(read, rollout))) is not None:
                index = counts[trajectory.task_id]
                found.append(trajectory if rollout.source is None else replace(trajectory, sample_index=index))
                counts[trajectory.task_id] += 1
    return Imported(tuple(found), tuple(refusals))


def _rollouts(record: Any, place: str, source: Format | None) -> list[Rollout]:
    if isinstance(record, DataError):
        raise record
    if isinstance(record, Trajectory):
        return [Rollout(record, None, place)]
    chosen = source or guess_format(record)
    return [Rollout(row, chosen, place) for row in rows_of(record, chosen)]


def is_text(rollout: Rollout) -> bool:
    """Return whether a rollout is recorded as messages, without token ids."""
    record: Mapping[str, Any] = rollout.record if isinstance(rollout.record, Mapping) else {}
    match rollout.source:
        case "atif" | "harbor":
            steps = mapping(document_of(record, rollout.source), "the trajectory").get("steps") or ()
            return not any("completion_token_ids" in (step.get("metrics") or {}) for step in steps)
        case "openenv" | "rllm":
            return record.get("turns") is None
        case "verifiers":
            return "nodes" not in record
        case source:
            return source in ("chat", "mini-swe-agent", "swe-agent", "inspect", "openhands")


def import_record(
    record: Any,
    source: Format | None,
    renderer_of: RendererOf | None = None,
    options: Observations = DEFAULTS,
    *,
    name: str = "imported",
) -> Trajectory:
    """Return the trajectory of one record. ``name`` is the task id of a record that has none.

    Without ``source`` its format is detected; a trajectory of ours is returned as it is.

    Raises:
        DataError: the record is not of that format, or is damaged; the message says where.
        RenderError: the chat template cannot write it.
    """
    if isinstance(record, Trajectory):
        return record
    outer = plain(record)
    source = source or guess_format(outer)
    if source == "rfc010":
        return from_rfc010(mapping(outer, "a record of RFC 010"), task_id=name)
    inner = document_of(outer, source)
    found = conversation_of(outer, source, name)
    tools = found.tools if found is not None and found.tools is not None else _tools(outer, inner)
    renderer = options.renderer if renderer_of is None else renderer_of(tools)
    options = replace(options, renderer=renderer, wrappers=options.wrappers or wrappers_of(inner, found))
    if found is not None:
        return trajectory_from_chat(found.messages, found.about, options)
    about = about_of(outer, inner, name)
    match source:
        case "atif" | "harbor":
            about = about_trial(outer, about) if source == "harbor" else about
            return trajectory_from_atif(inner, about, options)
        case "turns" | "rllm":
            return trajectory_from_turns(turns_of(_main_detail(outer)), about, options)
        case "trl" | "skyrl":
            return trajectory_from_trl(outer, about, options)
        case "verifiers":
            return trajectory_from_trace(outer, about, options)
        case _:
            return trajectory_from_openenv(outer, about, options)


def conversation_of(record: Any, source: Format, name: str) -> Conversation | None:
    """Return the conversation of a record of messages; None for the formats that have a reader of their own.

    Raises:
        DataError: the messages cannot be read.
    """
    fields: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
    match source:
        case "chat":
            raw = messages_in(fields) if fields else record
            return Conversation(messages=chat_messages(raw), about=about_of(record, record, name))
        case "rllm" if fields.get("turns") is None:
            return conversation_of(record, "chat", name)
        case "mini-swe-agent":
            return read_mini_swe_agent(mapping(record, "a mini-swe-agent run"), name)
        case "swe-agent":
            return read_swe_agent(mapping(record, "a run of SWE-agent"), name)
        case "inspect":
            return read_inspect(mapping(record, "a sample"), name)
        case "openhands":
            return read_openhands(record, name)
        case "verifiers" if "nodes" not in fields:
            return read_result(mapping(record, "a verifiers record"), name)
        case _:
            return None


def rows_of(record: Any, source: Format) -> list[Any]:
    """Return the rollouts that a record holds: the rows of a batch, the samples of a log, an episode's trajectories.

    Raises:
        DataError: it holds none, or columns of different lengths.
    """
    match source:
        case "trl":
            return list(trl_rows(record))
        case "skyrl":
            return list(skyrl_rows(mapping(plain(record), "a GeneratorOutput")))
        case "inspect":
            return samples_of(mapping(plain(record), "a log of inspect_ai"))
        case "rllm":
            return list(rllm_trajectories(mapping(plain(record), "an episode of rLLM")))
        case _:
            return [record]


def document_of(record: Any, source: Format) -> Any:
    """Return the ATIF document inside a record, or the record itself."""
    if source not in ("atif", "harbor") or not isinstance(record, Mapping) or "trajectory" not in record:
        return record
    return mapping(parsed(record["trajectory"], "the trajectory"), "the trajectory")


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


def _tools(outer: Any, inner: Any) -> tuple[ToolSpec, ...]:
    """Return the tools that a record lists in OpenAI's format; names alone say too little to render."""
    listed: Any = ()
    if isinstance(inner, Mapping):
        agent = inner.get("agent")
        listed = agent.get("tool_definitions") if isinstance(agent, Mapping) else first_of(outer, "tools")
    tools = []
    for given in parsed(listed, "tools") or ():
        tool = unpacked(given)
        function = unpacked(first_of(tool, "function") or tool) if isinstance(tool, Mapping) else {}
        schema = unpacked(first_of(function, "parameters", "input_schema")) if isinstance(function, Mapping) else None
        if isinstance(schema, Mapping):
            tools.append(ToolSpec(str(function["name"]), str(function.get("description") or ""), schema))
    return tuple(tools)


def wrappers_of(record: Any, found: Conversation | None) -> Wrappers:
    """Return the phrases of the harness that wrote a record, by its name or by what it says."""
    if found is not None:
        said = [message.text for message in found.messages if message.role in ("user", "tool")]
        return found.wrappers or find_wrappers(said)
    agent = record.get("agent") if isinstance(record, Mapping) else None
    name = agent.get("name") if isinstance(agent, Mapping) else None
    name, known = str(name).lower(), {"terminus": TERMINUS, "mini-swe": MINI_SWE_AGENT}
    otherwise = SWE_AGENT if name == "swe-agent" else NO_WRAPPERS
    return next((wrappers for part, wrappers in known.items() if part in name), otherwise)


def _fitting(trajectory: Trajectory, options: Observations, longest: int | None) -> Trajectory:
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

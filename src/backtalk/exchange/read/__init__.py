"""Trajectories of other libraries: read as plain data by their documented fields, none of them is needed here.

``import_files`` reads files, ``import_record`` one record. Below them stands one function a format.
"""

from backtalk.exchange.read.atif import atif_messages, trajectory_from_atif
from backtalk.exchange.read.chat import ChatMessage, openai_messages, trajectory_from_chat
from backtalk.exchange.read.files import (
    FORMATS,
    Format,
    Imported,
    ImportOptions,
    Refusal,
    cut_to,
    import_files,
    import_record,
)
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.openenv import awm_messages, trajectory_from_openenv
from backtalk.exchange.read.trl import rows_of, trajectory_from_trl
from backtalk.exchange.read.turns import About, OnDrift, Turn, trajectory_from_turns, turns_of
from backtalk.exchange.read.verifiers import trajectory_from_trace
from backtalk.exchange.read.wrappers import NO_WRAPPERS, TERMINUS, Wrappers

__all__ = [
    "FORMATS",
    "NO_WRAPPERS",
    "TERMINUS",
    "About",
    "ChatMessage",
    "Format",
    "ImportOptions",
    "Imported",
    "Observations",
    "OnDrift",
    "Refusal",
    "Turn",
    "Wrappers",
    "atif_messages",
    "awm_messages",
    "cut_to",
    "import_files",
    "import_record",
    "openai_messages",
    "rows_of",
    "trajectory_from_atif",
    "trajectory_from_chat",
    "trajectory_from_openenv",
    "trajectory_from_trace",
    "trajectory_from_trl",
    "trajectory_from_turns",
    "turns_of",
]

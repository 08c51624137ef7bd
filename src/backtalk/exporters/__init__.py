"""Our trajectories as the records of other libraries: plain dicts, none of them is needed here.

The way back is ``backtalk.importers``. ATIF is ``backtalk.harbor.atif.to_atif``, RFC 010 ``backtalk.rfc010.to_rfc010``.
"""

from backtalk.exporters.openenv import to_episode_record, to_training_trace
from backtalk.exporters.written import agent_segments

__all__ = ["agent_segments", "to_episode_record", "to_training_trace"]

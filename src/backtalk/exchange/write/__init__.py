"""Our trajectories as the records of other libraries: plain dicts, none of them is needed here.

The way back is ``backtalk.exchange.read``. ATIF is written by ``atif.to_atif``, RFC 010's record by
``backtalk.exchange.rfc010.to_rfc010``.
"""

from backtalk.exchange.write.openenv import to_episode_record, to_training_trace

__all__ = ["to_episode_record", "to_training_trace"]

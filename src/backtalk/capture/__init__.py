"""Episodes of anybody: a script, a person, a model behind an API, recorded by the rollout that training uses.

Somebody who decides is an ``Author``. ``capture_episode`` plays a task with one and gives a ``Trajectory``.
"""

from backtalk.capture.author import Author, Left, Reply, Seen
from backtalk.capture.lines import read_action
from backtalk.capture.people import Person, Script, read_script
from backtalk.capture.rollout import capture_episode

__all__ = ["Author", "Left", "Person", "Reply", "Script", "Seen", "capture_episode", "read_action", "read_script"]

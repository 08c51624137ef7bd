"""Generate triage tasks: an alert fires, and the agent finds its cause in the files of a simulated machine.

Each task has a machine of its own, made from a seed: services with configs, unit files, logs, metrics, a process
table and backups. A question is answered with ordinary tools over those files; some also want a file changed. Levels:

1. one command over a file that is named
2. one pipeline, or two commands: the file has to be found, or the lines to be put in order
3. one file leads to the next, or a file has to be changed
4. only the alert is given: compare, repair, and name the cause
"""

from backtalk.tasks.triage.generate import LEVELS, triage_task, triage_tasks

__all__ = ["LEVELS", "triage_task", "triage_tasks"]

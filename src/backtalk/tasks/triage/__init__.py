"""Triage: an alert fires, a small agent opens a terminal in somebody's box and finds the cause.

Every task builds its own box from a seed: services with configs, unit files, logs, metrics, a process
table and backups, all with fresh random content. Its question can only be answered with real tools over
those files; some also want a file changed. Levels:

1. one command finds it, and the file is named
2. one pipeline, or two commands: the file has to be found, or the lines to be put in order
3. what one file says leads to the next; or a file has to be changed
4. only the alert is given: compare, repair, and name the cause
"""

from backtalk.tasks.triage.generate import LEVELS, triage_task, triage_tasks

__all__ = ["LEVELS", "triage_task", "triage_tasks"]

"""The local sandbox: Linux namespaces by bubblewrap, without a daemon, an image or root.

Two layers, both made by ``bwrap``. The outer one owns what must outlive a restart: a size-limited tree in memory,
the host's ``/usr`` read-only, no network but its own loopback, a host name. Its only process is the trusted holder
(see `exec_server`). The inner one is a session: a process namespace of its own over the same files, in which the
agent cannot see the holder. `restart` ends one session and begins the next.

What a later process would trust without asking (``/usr``, ``/bin``, ``/lib*``, the loader's and the user tables in
``/etc``) is mounted in the session, so that no agent can rename it away and put its own in its place.

As root, every sandbox runs under a host uid of its own and never under uid 0: to user namespaces without that,
much of ``/proc/sys`` is still root's to write. Dropped by ``setpriv``, not by ``preexec_fn`` or ``Popen(user=)``:
these fork the trainer, which may hold many gigabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import posixpath
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, ExecResult, SandboxFile, SandboxLimits
from backtalk.sandboxes.cgroup import Cgroup, remove_stale
from backtalk.sandboxes.exec_server import DEFAULT_PATH, HOLDER, Rlimits, frames, supervisor_program
from backtalk.sandboxes.pipes import FrameReader, PipePair, write_all
from backtalk.sandboxes.probe import Machine, advice, probe
from backtalk.sandboxes.seccomp import seccomp_program
from backtalk.sandboxes.shell import START_TIMEOUT_S, STOP_TIMEOUT_S, Session

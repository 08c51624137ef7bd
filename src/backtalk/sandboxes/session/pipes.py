"""Pipes read and written without blocking the event loop: frames in, bytes out, output with a cap."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import termios
from dataclasses import dataclass

from backtalk.errors import SandboxError

_READ_BYTES = 65_536
_DROP_PAUSE_S = 0.001  # between reads of output nobody keeps: endless output costs 64 MB/s, not a core
_FRAME_BYTES = 4 << 20  # a longer frame, and more frames waiting than this, are nobody's honest reports
_WAITING_FRAMES = 256
_FIRST_GIVEN = 10  # bash programs move what they are given to 3..9; one of these would be overwritten before it is read


class FloodedError(Exception):
    """The other side says far more than was asked for. Nothing more is read from it until `FrameReader.clear`."""


@dataclass(frozen=True, slots=True)
class PipePair:
    """Both ends of a pipe; ours does not block."""

    ours: int
    theirs: int

    @classmethod
    def to_read(cls) -> PipePair:
        """We read, they write."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        return cls(ours, moved_up(theirs))

    @classmethod
    def to_write(cls) -> PipePair:
        """We write, they read."""
        theirs, ours = os.pipe()
        os.set_blocking(ours, False)
        return cls(ours, moved_up(theirs))

    @classmethod
    def shared_file(cls) -> PipePair:
        """A file in memory without a name, open on both sides. Nothing is ever sent through; it just lies there."""
        ours = os.memfd_create("backtalk-files", os.MFD_CLOEXEC)
        return cls(ours, moved_up(os.dup(ours)))


def moved_up(descriptor: int) -> int:
    """The same open file under a number that a child can be given."""
    if descriptor >= _FIRST_GIVEN:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_GIVEN)
    os.close(descriptor)
    return moved


def sealed_file(content: bytes) -> int:
    """A file in memory nobody can change any more, open at its beginning. It has no name.

    Raises:
        OSError: the kernel refuses.
    """
    descriptor = moved_up(os.memfd_create("backtalk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class FrameReader:
    """Frames from a pipe, in order: bytes ended by `end`."""

    def __init__(self, fd: int, *, end: bytes = b"\0", max_bytes: int = _FRAME_BYTES) -> None:
        self._fd = fd
        self._end = end
        self.max_bytes = max_bytes
        self._buffer = bytearray()
        self._frames: list[bytes] = []
        self._news = asyncio.Event()
        self.closed = False
        self._flooded = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            self._loop.remove_reader(self._fd)
        elif len(self._buffer) + len(data) <= self.max_bytes:
            self._buffer += data
            *whole, rest = self._buffer.split(self._end) if self._end in data else (self._buffer,)
            self._frames += [bytes(frame) for frame in whole]
            self._buffer = bytearray(rest)
        if len(self._buffer) + len(data) > self.max_bytes or len(self._frames) > _WAITING_FRAMES:
            self._flooded = True
            self._loop.remove_reader(self._fd)
        self._news.set()

    async def next(self) -> bytes:
        """The next frame without its end.

        Raises:
            SandboxError: the other side closed the pipe.
            FloodedError: it said too much.
        """
        while not self._frames:
            if self._flooded:
                raise FloodedError
            if self.closed:
                raise SandboxError("the sandbox's process is gone")
            self._news.clear()
            await self._news.wait()
        return self._frames.pop(0)

    def clear(self) -> None:
        """Forget everything said so far."""
        with contextlib.suppress(BlockingIOError):
            while not self.closed and os.read(self._fd, _READ_BYTES):
                pass
        self._frames.clear()
        self._buffer.clear()
        if self._flooded:
            self._flooded = False
            self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        if not self.closed:
            self._loop.remove_reader(self._fd)
        self.closed = True
        self._news.set()
        os.close(self._fd)


class OutputReader:
    """What commands print. Always read, so that a background server never stands still on a full pipe."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        self._fd = fd
        self._max_bytes = max_bytes
        self._kept = bytearray()
        self._dropped = 0
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(fd, self._read)

    def _read(self, at_most: int = _READ_BYTES) -> int:
        try:
            data = os.read(self._fd, at_most)
        except BlockingIOError:
            return 0
        if not data:
            self._loop.remove_reader(self._fd)
            return 0
        room = self._max_bytes - len(self._kept)
        self._kept += data[:room]
        self._dropped += max(0, len(data) - room)
        if self._dropped and self._pause is None:
            self._loop.remove_reader(self._fd)
            self._pause = self._loop.call_later(_DROP_PAUSE_S, self._resume)
        return len(data)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._read)

    def take(self) -> tuple[str, int]:
        """What was printed by now, and how many bytes more there were. Then start afresh."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
        left = waiting[0]  # no more than this: a background job may print without end
        while left > 0 and (got := self._read(min(left, _READ_BYTES))):
            left -= got
        kept = self._kept
        if self._dropped:  # do not cut a character in two
            kept = kept[: len(kept) - _partial_character(kept)]
            self._dropped += len(self._kept) - len(kept)
        taken = kept.decode("utf-8", "replace"), self._dropped
        self._kept, self._dropped = bytearray(), 0
        return taken

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


def _partial_character(data: bytearray) -> int:
    """How many bytes at the end begin a UTF-8 character that is not complete."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if length > back else 0
    return 0


async def write_all(fd: int, data: bytes) -> None:
    """Write everything, waiting where the pipe is full.

    Raises:
        SandboxError: nobody reads it any more.
    """
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, lambda done=ready: done.done() or done.set_result(None))
            try:
                await ready
            finally:
                loop.remove_writer(fd)
        except OSError as error:
            raise SandboxError(f"the sandbox's process is gone ({error.strerror})") from error

"""Read and write pipes without blocking the event loop: frames, bytes, and output of which a part is kept."""

from __future__ import annotations

import array
import asyncio
import codecs
import contextlib
import fcntl
import os
import termios
from dataclasses import dataclass
from typing import NamedTuple

from backtalk.errors import SandboxError

_READ_BYTES = 65_536
_DROP_PAUSE_S = 0.001  # between reads of output that is dropped: endless output costs 64 MB/s, not a core
_FRAME_BYTES = 4 << 20  # no honest report has a longer frame, or more of them waiting
_WAITING_FRAMES = 256
_FIRST_PASSED = 10  # the bash programs move what is passed to them to 3..9, and would overwrite one of these


class FloodedError(Exception):
    """The other side sent too much. Nothing more is read from it until `FrameReader.clear`."""


@dataclass(frozen=True, slots=True)
class PipePair:
    """Both ends of a pipe: ours, which does not block, and the child's."""

    ours: int
    theirs: int

    @classmethod
    def to_read(cls) -> PipePair:
        """Make a pipe that we read."""
        return cls._make(*os.pipe())

    @classmethod
    def to_write(cls) -> PipePair:
        """Make a pipe that we write."""
        return cls._make(*reversed(os.pipe()))

    @classmethod
    def _make(cls, ours: int, theirs: int) -> PipePair:
        os.set_blocking(ours, False)
        return cls(ours, with_high_number(theirs))

    @classmethod
    def shared_file(cls) -> PipePair:
        """Make a file in memory without a name, open on both sides."""
        ours = os.memfd_create("backtalk-files", os.MFD_CLOEXEC)
        return cls(ours, with_high_number(os.dup(ours)))


def with_high_number(descriptor: int) -> int:
    """Return the same open file under a number that can be passed to a bash program."""
    if descriptor >= _FIRST_PASSED:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_PASSED)
    os.close(descriptor)
    return moved


def sealed_file(content: bytes) -> int:
    """Return a file in memory without a name, which cannot be changed any more, open at its beginning.

    Raises:
        OSError: the kernel refuses.
    """
    descriptor = with_high_number(os.memfd_create("backtalk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class FrameReader:
    """A reader of frames from a pipe, in order. A frame is bytes ended by `end`."""

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
        """Wait for the next frame and return it without its end.

        Raises:
            SandboxError: the other side closed the pipe.
            FloodedError: the other side sent too much.
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
        """Drop everything that was sent so far."""
        with contextlib.suppress(BlockingIOError):
            while not self.closed and os.read(self._fd, _READ_BYTES):
                pass
        self._frames.clear()
        self._buffer.clear()
        if self._flooded:
            self._flooded = False
            self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        """Close the pipe."""
        if not self.closed:
            self._loop.remove_reader(self._fd)
        self.closed = True
        self._news.set()
        os.close(self._fd)


class Output(NamedTuple):
    """What was printed: of more than fits, the beginning and the end, joined at character ``dropped_at``."""

    text: str
    dropped_bytes: int
    dropped_at: int


class OutputReader:
    """A reader of what commands print. It reads all the time, so that no background server blocks on a full pipe."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        self._fd = fd
        self._half = max_bytes // 2
        self._head, self._tail = bytearray(), bytearray()
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
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        excess = max(0, len(self._tail) - self._half)
        del self._tail[:excess]
        self._dropped += excess
        if self._dropped and self._pause is None:
            self._loop.remove_reader(self._fd)
            self._pause = self._loop.call_later(_DROP_PAUSE_S, self._resume)
        return len(data)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._read)

    def take(self) -> Output:
        """Return the output since the last call."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
        left = waiting[0]  # no more than this: a background job may print without end
        while left > 0 and (got := self._read(min(left, _READ_BYTES))):
            left -= got
        head, tail, dropped = self._head, self._tail, self._dropped
        self._head, self._tail, self._dropped = bytearray(), bytearray(), 0
        if not dropped:
            text = (head + tail).decode("utf-8", "replace")
            return Output(text, 0, len(text))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(head)  # without a character that was cut in two, nor the rest of one in the tail
        rest = next((n for n, byte in enumerate(tail[:3]) if byte & 0xC0 != 0x80), 3)
        dropped += len(decoder.getstate()[0]) + rest
        return Output(text + tail[rest:].decode("utf-8", "replace"), dropped, len(text))

    def close(self) -> None:
        """Close the pipe."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


async def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, waiting while the pipe is full.

    Raises:
        SandboxError: the other side closed the pipe.
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

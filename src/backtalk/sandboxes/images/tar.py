"""Unpacks the tar file of a root. Its author is not trusted with this machine: nothing is written outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backtalk.errors import ConfigError
from backtalk.sandboxes.files import clean_path

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


def is_tar(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(_SUFFIXES)


def unpack(path: Path, folder: Path) -> None:
    """Write what `path` holds below `folder`, all of it ours, without devices, pipes and rights of other users.

    A link may point anywhere, as links in a root do: it is followed by processes inside, for which `folder` is the
    root, and never here. Modes are kept less set-user-id, and a file's or folder's owner can always read and write it.

    Raises:
        ConfigError: it is damaged, or a name in it leads out of the root or through a link.
    """
    modes: dict[Path, int] = {}
    try:
        with _opened(path) as archive:
            for member in archive:
                _unpack_one(archive, member, folder, modes)
    except (tarfile.TarError, EOFError, OSError, UnicodeError) as error:
        raise ConfigError(f"root {path} cannot be unpacked: {error}") from error
    for place, mode in modes.items():
        place.chmod(mode)
    if (folder / "manifest.json").is_file():
        raise ConfigError(
            f"root {path} is an image of layers (`docker save`); write one tree instead: "
            "docker export $(docker create IMAGE) -o root.tar"
        )


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, modes: dict[Path, int]) -> None:
    place = _place(folder, member.name)
    if place == folder:
        modes[folder] = 0o755
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if not member.isdir() and os.path.lexists(place):
        place.unlink()  # a later member of the same name wins; a folder in its place is an error
    if member.isdir():
        place.mkdir(exist_ok=True)
        modes[place] = member.mode & 0o1777 | 0o700
    elif member.issym():
        os.symlink(member.linkname, place)
    elif member.islnk():
        os.link(_place(folder, member.linkname), place, follow_symlinks=False)
    elif member.isreg():
        content = archive.extractfile(member)
        assert content is not None
        with content, open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        place.chmod(member.mode & 0o775 | 0o600)  # as tarfile's "data" filter has it, but for the group
        os.utime(place, (member.mtime, member.mtime))


def _place(folder: Path, name: str) -> Path:
    """Where a member goes. Its folders are real ones, so that writing there stays below `folder`."""
    if (name := name.strip("/")) in ("", "."):
        return folder
    try:
        parts = clean_path(name, relative=True).split("/")
    except ConfigError as error:
        raise tarfile.TarError(str(error)) from error
    place = folder
    for part in parts[:-1]:
        place = place / part
        if place.is_symlink() or (os.path.lexists(place) and not place.is_dir()):
            raise tarfile.TarError(f"{name!r} goes through {place.relative_to(folder)}, which is no folder")
    return place / parts[-1]


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    if path.suffix != ".zst":
        with tarfile.open(path, "r|*") as archive:
            yield archive
        return
    if shutil.which("zstd") is None:
        raise ConfigError(f"root {path} is packed by zstd, which is not installed here; install it, or use .tar.gz")
    with subprocess.Popen(["zstd", "-dcq", "--", str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield archive
        process.stdout.read()
    if process.returncode != 0:
        raise ConfigError(f"root {path} cannot be unpacked: zstd ended with exit code {process.returncode}")

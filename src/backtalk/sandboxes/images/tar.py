"""Unpack the tar file of a root file system. Its author is not trusted: nothing is written outside of the folder."""

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

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


def unpack(path: Path, folder: Path) -> None:
    """Unpack an archive into `folder`. All files are this process's; devices, pipes and set-user-id bits are left out.

    A link may point anywhere, as links in a root do: processes inside follow it, for which `folder` is the root; here
    it is never followed. The owner of a file or folder can always read and write it.

    Raises:
        ConfigError: the archive is damaged, or a name in it leads out of the root or through a link.
    """
    modes: dict[Path, int] = {}
    try:
        with _opened(path) as archive:
            for member in archive:
                _unpack_one(archive, member, folder, modes)
    except (tarfile.TarError, EOFError, OSError, UnicodeError) as error:
        raise ConfigError(f"root {path} cannot be unpacked: {error}") from error
    for target, mode in modes.items():
        target.chmod(mode)
    if (folder / "manifest.json").is_file():
        raise ConfigError(
            f"root {path} is an image of layers (`docker save`); write one tree instead: "
            "docker export $(docker create IMAGE) -o root.tar"
        )


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, modes: dict[Path, int]) -> None:
    """Unpack one member; modes of folders are noted in `modes`, to be set at the end."""
    target = _path_of(folder, member.name)
    if target == folder:
        modes[folder] = 0o755
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if not member.isdir() and os.path.lexists(target):
        target.unlink()  # a later member of the same name wins; a folder in its target is an error
    if member.isdir():
        target.mkdir(exist_ok=True)
        modes[target] = member.mode & 0o1777 | 0o700
    elif member.issym():
        os.symlink(member.linkname, target)
    elif member.islnk():
        os.link(_path_of(folder, member.linkname), target, follow_symlinks=False)
    elif member.isreg():
        content = archive.extractfile(member)
        assert content is not None
        with content, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        target.chmod(member.mode & 0o775 | 0o600)  # as tarfile's "data" filter, except for the group
        os.utime(target, (member.mtime, member.mtime))


def _path_of(folder: Path, name: str) -> Path:
    """Return the path for a member, whose parent folders are no links, so that writing there stays below `folder`."""
    if (name := name.strip("/")) in ("", "."):
        return folder
    try:
        parts = clean_path(name, relative=True).split("/")
    except ConfigError as error:
        raise tarfile.TarError(str(error)) from error
    path = folder
    for part in parts[:-1]:
        path = path / part
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise tarfile.TarError(f"{name!r} goes through {path.relative_to(folder)}, which is not a folder")
    return path / parts[-1]


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive as a stream; zstd by its program."""
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

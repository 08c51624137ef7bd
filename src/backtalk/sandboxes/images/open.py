"""Open a root file system: a folder, a tar file that `docker export` wrote, or a Dockerfile.

The result is a folder that is never written to (`Root`). It is unpacked or built once, and kept by content in
``$XDG_CACHE_HOME/backtalk/roots``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backtalk.errors import ConfigError
from backtalk.sandboxes.images.build import build_root
from backtalk.sandboxes.images.plan import read_plan
from backtalk.sandboxes.images.tar import TAR_SUFFIXES, unpack
from backtalk.sandboxes.machine.probe import probe, require_bubblewrap
from backtalk.sandboxes.root import Root, cached_folder, file_digest, read_root


def open_root(choice: str | None, *, images: Mapping[str, str] | None = None) -> Root | None:
    """Open the root file system that `choice` names, unpacking or building it unless it is in the cache.

    Returns None for this machine's own programs over an empty tree.

    `choice` is None or "host"; a folder; a tar file as `docker export` writes it (.tar, .tar.gz, .tar.xz, .tar.zst);
    a Dockerfile or a folder with one. `images` maps the image names of a Dockerfile's FROM to choices;
    an image that is missing there is "host".

    Raises:
        ConfigError: there is no such root, or it cannot be used; the message says why.
        SandboxUnavailable: bubblewrap, which builds it and starts from it, is not installed.
    """
    if choice is None or choice == "host":
        return None
    machine = probe(use_cgroups=False)
    path = Path(choice).expanduser().resolve()
    if path.is_dir() and (path / "Dockerfile").is_file():
        path = path / "Dockerfile"
    if path.is_dir():
        return read_root(path, machine, str(path))
    if not path.is_file():
        raise ConfigError(
            f"root {choice!r} does not exist; name a folder, a file of `docker export`, a Dockerfile or host"
        )
    if path.name == "Dockerfile" or path.suffix == ".Dockerfile" or path.name.startswith("Dockerfile."):
        plan, given = read_plan(path), images or {}
        require_bubblewrap(machine)
        return build_root(plan, lambda image: open_root(given.get(image, "host"), images=images), machine)
    if not path.name.endswith(TAR_SUFFIXES):
        raise ConfigError(f"root {path} is neither a folder nor a .tar file nor a Dockerfile")
    place = cached_folder(f"tar-{file_digest(path)}", lambda folder: unpack(path, folder))
    return read_root(place, machine, str(path))

"""Root file systems from a folder, a tar file and a Dockerfile: how they are opened, and what an agent can do to them.

The whole conformance suite ran over a Debian root by hand (docs/sandbox.md); here a part of it runs over a root made of
this machine's own programs.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, SandboxError, SandboxUnavailable
from backtalk.sandboxes import SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend
from backtalk.sandboxes.conformance import CHECKS, Outcome, conformance
from backtalk.sandboxes.images.open import open_root
from backtalk.sandboxes.images.tar import unpack
from backtalk.sandboxes.root import cache_folder, cached_folder, resolve_inside
from sandbox_help import backend_or_skip

PROGRAMS = (
    "bash awk basename cat chmod cp cut date df diff dirname env find getent grep head hostname id ln ls mkdir mkfifo "
    "mktemp mount mv nohup printenv readlink rm rmdir sed seq setsid sleep sort stat tail tar tee timeout touch tr "
    "truncate umount uname uniq wc xargs"
).split()
# The checks that could go another way over another root.
ONLY = (
    "starts_at_home session_persists local_server usual_tools writable_places put_and_get put_wins odd_names one_tree "
    "get_of_no_file restart_keeps_files restart_runs_no_profile disk sparse_files too_large_to_put "
    "full_disk_and_verifier links_out_of_get links_out_of_put files_of_the_machine mounts user_namespaces capabilities "
    "not_root_outside devices programs_of_the_machine root_of_process_one trusted_files broken_folders shut_root "
    "rewritten_programs files_of_a_neighbour nothing_of_the_last_one no_process_is_left"
).split()
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Make a folder that other users can read, which they cannot with pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="backtalk-rootfs-"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module", autouse=True)
def cache(place: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        yield


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """Make a root of a few of this machine's programs, with a file of its own in each kind of folder."""
    backend_or_skip()
    root = place / "root"
    paths = {os.path.realpath(found): found for name in PROGRAMS if (found := shutil.which(name))}
    linked = subprocess.run(["ldd", *paths], capture_output=True, text=True, check=False).stdout
    for folder in ("usr/bin", "usr/lib", "etc/alternatives", "opt/data", "tmp", "var/lib", "usr/share"):
        (root / folder).mkdir(parents=True)
    for link in ("bin", "lib"):
        (root / link).symlink_to(f"usr/{link}")
    for real, found in paths.items():
        shutil.copy(real, root / "usr/bin" / Path(found).name)
    (root / "usr/bin/sh").symlink_to("bash")
    for library in set(re.findall(r"(/\S+) \(", linked)):
        to = root / (library.lstrip("/") if "/ld-" in library else f"usr/lib/{Path(library).name}")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, to)
    (root / "etc/os-release").write_text("NAME=Tiny\n")
    (root / "etc/passwd").write_text("somebody:x:5:5::/:/bin/sh\n")
    (root / "opt/data/file").write_text("of the root\n")
    (root / "opt/link").symlink_to("/opt/data")
    return root


@pytest.fixture(scope="module")
def tar(tree: Path, place: Path) -> Path:
    path = place / "tiny.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(tree, arcname=".")
    return path


def over(choice: Path, images: dict[str, str] | None = None) -> BubblewrapBackend:
    """Return a backend whose sandboxes start from a chosen root."""
    return BubblewrapBackend(root=open_root(str(choice), images=images))


def outputs(backend: BubblewrapBackend, *commands: str, disk_mb: int = 64) -> list[str]:
    """Run commands in one sandbox and return what each printed; RESTART restarts the sandbox."""

    async def run() -> list[str]:
        async with backend.open(SandboxLimits(disk_mb=disk_mb)) as sandbox:
            out = []
            for command in commands:
                if command == "RESTART":
                    await sandbox.restart()
                else:
                    out.append((await sandbox.exec(command, timeout_s=30)).output)
            return out

    return asyncio.run(run())


# A folder


def test_a_folder_is_seen_written_over_and_never_changed(tree: Path) -> None:
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in tree.rglob("*"))
    backend = over(tree)
    assert str(tree) in backend.report.isolation["files"] and not any("copied" in w for w in backend.report.warnings)
    seen, changed, after = outputs(
        backend,
        "cat /etc/os-release /opt/link/file; id -un; stat -c %U /opt/data/file; pwd",
        "echo mine >>/opt/data/file; rm -r /var/lib; mkdir /var/lib; ls /var/lib; "
        "touch /usr/x /bin/x /lib/x /usr/bin/cat; mkdir /usr/lib/python3; mv /bin /b; echo $?",
        "cat /opt/data/file",
    )
    assert seen == "NAME=Tiny\nof the root\nagent\nagent\n/home/agent\n"
    assert changed.count("Read-only file system") == 5 and changed.endswith("busy\n1\n"), changed
    assert after == "of the root\nmine\n"
    assert outputs(backend, "cat /opt/data/file; ls -d /var/lib") == ["of the root\n/var/lib\n"]  # another sandbox
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tree.rglob("*")) == before


def test_its_size_is_limited(tree: Path) -> None:
    fill = "head -c 5M /dev/zero >/opt/data/big && head -c 5M /dev/zero >/srv/big"
    assert "No space left" in outputs(over(tree), fill, disk_mb=8)[0]


def test_places_of_code_that_the_root_lacks_cannot_be_made(tree: Path) -> None:
    commands = ("mkdir /sbin/x", "touch /lib32/x", "echo x >/etc/ld.so.cache", "touch /etc/alternatives/x /.bwrap/x")
    out = outputs(over(tree), "; ".join(commands))[0]
    assert out.count("Read-only file system") == 5, out


def test_a_root_that_cannot_serve_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_root("/nowhere/at/all")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        open_root(str(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no bash, tar, .*apk add bash"):
        open_root(str(tmp_path / "empty"))
    odd = tmp_path / "odd"
    shutil.copytree(tree, odd, symlinks=True)
    (odd / "bin").unlink()
    shutil.move(odd / "usr/bin", odd / "opt/bin")
    (odd / "bin").symlink_to("/opt/bin")
    with pytest.raises(ConfigError, match="/bin leads to /opt/bin, where an agent could write"):
        open_root(str(odd))
    assert open_root(None) is open_root("host") is None


def test_links_are_followed_as_inside(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for link, target in {
        "abs": "/a",
        "up": "../../a/b",
        "loop": "loop",
        "a/b/out": "/../../etc",
        "gone": "/no",
    }.items():
        (tmp_path / link).symlink_to(target)
    found = [resolve_inside(tmp_path, path) for path in ("abs/b", "/up/", "loop", "a/b/out", "gone", "a/../abs", "x")]
    assert found == ["a/b", "a/b", None, None, None, "a", None]


def test_without_an_overlay_it_is_copied(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = BubblewrapBackend._trial, []

    def trial(self: BubblewrapBackend) -> None:
        assert self._root is not None
        tried.append(self._root.how)
        if self._root.how == "overlay":
            raise SandboxUnavailable("not here") from OSError("no idmapped mounts")
        real(self)

    monkeypatch.setattr(BubblewrapBackend, "_trial", trial)
    backend = over(tree)
    assert tried == ["overlay", "copy"]
    assert any("copied into each sandbox" in w and "idmapped" in w for w in backend.report.warnings)
    checks = ["writable_places", "trusted_files", "broken_folders", "programs_of_the_machine", "one_tree"]
    results = asyncio.run(conformance(backend, only=checks))
    assert [(r.check.name, r.reason) for r in results if r.outcome is Outcome.FAILED] == []
    assert outputs(backend, "cat /opt/link/file; echo x >>/opt/data/file; stat -c %U /opt/data") == [
        "of the root\nagent\n"
    ]
    (tree / "opt/large").write_bytes(bytes(3 << 20))
    try:
        with pytest.raises(SandboxError, match="outside of its programs is larger than the sandbox's disk"):
            outputs(backend, "true", disk_mb=2)
    finally:
        (tree / "opt/large").unlink()


# A tar file


def test_a_tar_file_is_unpacked_once_by_its_content(tar: Path, place: Path) -> None:
    first = open_root(str(tar))
    shutil.copy(tar, place / "other-name.tar.gz")
    second = open_root(str(place / "other-name.tar.gz"))
    assert first is not None and second is not None and first.folder == second.folder
    backend = over(tar)
    assert outputs(backend, "cat /opt/link/file; id -un; echo x >/opt/data/new; ls /opt/data") == [
        "of the root\nagent\nfile\nnew\n"
    ]


def test_zstd(tree: Path, tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    archive(tmp_path / "a.tar", entry("x", content=b"1"))
    subprocess.run(["zstd", "-q", str(tmp_path / "a.tar")], check=True)
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    assert (tmp_path / "out/x").read_bytes() == b"1"


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", content: bytes = b"", mode: int = 0o644
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), mode
    return info, content


def archive(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for info, content in entries:
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../evil")],
        [entry("a/../../evil")],
        [entry("a", tarfile.SYMTYPE, link=".."), entry("a/evil")],
        [entry("a", tarfile.SYMTYPE, link="/tmp"), entry("a/b/evil")],
        [entry("a", tarfile.LNKTYPE, link="../secret")],
        [entry("l", tarfile.SYMTYPE, link=".."), entry("a", tarfile.LNKTYPE, link="l/secret")],
        [entry("a", tarfile.DIRTYPE), entry("a", content=b"x")],
    ],
)
def test_nothing_is_unpacked_outside(tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    (tmp_path / "secret").write_text("of the machine")
    path = archive(tmp_path / "evil.tar", *entries)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        unpack(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"secret", "evil.tar", "out"}


def test_what_is_unpacked_is_harmless_and_ours(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "a.tar",
        entry("./", tarfile.DIRTYPE),
        entry("/abs", content=b"1", mode=0o6777),
        entry("shut", tarfile.DIRTYPE, mode=0o555),
        entry("shut/f", content=b"old", mode=0o444),
        entry("shut/f", content=b"new", mode=0o400),
        entry("disk", tarfile.BLKTYPE),
        entry("pipe", tarfile.FIFOTYPE),
        entry("link", tarfile.SYMTYPE, link="/etc/shadow"),
        entry("link", content=b"not through it"),
        entry("hard", tarfile.LNKTYPE, link="./shut/f"),
    )
    out = tmp_path / "out"
    out.mkdir()
    unpack(path, out)
    modes = {str(p.relative_to(out)): oct(p.lstat().st_mode & 0o7777) for p in out.rglob("*")}
    assert modes == {
        "abs": "0o775", "shut": "0o755", "shut/f": "0o600", "link": "0o644", "hard": "0o600"
    }  # fmt: skip
    assert (out / "hard").read_text() == "new" and (out / "link").read_text() == "not through it"


def test_a_broken_tar_file_leaves_nothing(tar: Path, tmp_path: Path) -> None:
    (tmp_path / "half.tar.gz").write_bytes(tar.read_bytes()[:100_000])
    before = {p.name for p in cache_folder().iterdir() if p.is_dir()}
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        open_root(str(tmp_path / "half.tar.gz"))
    saved = archive(tmp_path / "saved.tar", entry("manifest.json", content=b"[]"), entry("x/layer.tar"))
    with pytest.raises(ConfigError, match="docker export"):
        open_root(str(saved))
    assert {p.name for p in cache_folder().iterdir() if p.is_dir()} == before


# A Dockerfile

DOCKERFILE = r"""
ARG BASE=tiny:1
FROM ${BASE}
ENV APP=/srv/app GREETING="hello there" \
    PATH=/srv/app/bin:$PATH
WORKDIR $APP
COPY . .
COPY a.txt run.sh /opt/two/
COPY a.txt /etc/renamed.conf
COPY <<END /opt/inline.txt
app is $APP
END
ADD lib.tar /opt/unpacked
RUN mkdir -p bin && cp run.sh bin/tool && id -u >who && echo $RANDOM $RANDOM $RANDOM >once
RUN <<END
set -e
echo "$GREETING" >greeting
END
RUN <<'END'
#!/bin/bash
[[ $BASH == /bin/bash ]] && echo "$0" >script
END
RUN cat >/opt/x <<A && echo done >/opt/y
body $HOME
A
VOLUME /opt/v
USER worker
RUN ["bash", "-c", "id -u >>who"]
CMD ["bash"]
"""
SHOW = (
    "pwd; tool; ls -d /opt/v; "
    "cat who greeting script /opt/{inline.txt,x,y} /etc/renamed.conf /opt/two/a.txt /opt/unpacked/sub/b"
)
SHOWN = (
    "/srv/app\nran\n/opt/v\n0\n1000\nhello there\n/.stage/script\napp is /srv/app\nbody /root\ndone\nhello\nhello\nb\n"
)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_text("b\n")
    (tmp_path / "a.txt").write_text("hello\n")
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "run.sh").chmod(0o755)
    with tarfile.open(tmp_path / "lib.tar", "w") as file:
        file.add(tmp_path / "sub", arcname="sub")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    return tmp_path


@pytest.mark.parametrize("base", ["tree", "tar", "host"])
def test_a_dockerfile_is_built_offline(context: Path, base: str, request: pytest.FixtureRequest) -> None:
    images = {"tiny:1": "host" if base == "host" else str(request.getfixturevalue(base))}
    if base != "host":
        with (context / "Dockerfile").open("a") as file:
            file.write("USER root\nRUN ln -s /usr/bin/env /usr/bin/env2 && ! test -e /usr/bin/python3\n")
    backend = over(context, images)
    assert "FROM tiny:1" in backend.report.isolation["files"]
    shown, changed = outputs(
        backend, SHOW, "echo more >>a.txt; cat a.txt; rm -r sub; stat -c %U once; echo $APP; ls -A /.stage"
    )
    assert shown == SHOWN
    assert changed == "hello\nmore\nagent\n/srv/app\nls: cannot access '/.stage': No such file or directory\n"
    once = outputs(backend, "cat once")
    assert outputs(over(context / "Dockerfile", images), "cat once") == once  # not built again
    (context / "a.txt").write_text("changed\n")
    assert outputs(over(context, images), "cat /etc/renamed.conf") == ["changed\n"]


def test_its_variables_do_not_choose_the_verifiers_programs(context: Path, tree: Path) -> None:
    backend = over(context, {"tiny:1": str(tree)})
    evil = "printf '#!/bin/bash\\necho evil\\n' >bin/bash; chmod +x bin/bash; cp bin/bash bin/ls; hash -r; ls; exit 3"
    out = outputs(backend, evil, "ls", "RESTART", "ls -d /srv; bash -c 'echo good'; echo $PATH; pwd")
    assert out[0] == "evil\n" and out[1] == "evil\n"  # the agent's own doing holds for the agent
    assert out[2].startswith("/srv\ngood\n/usr/local/sbin:") and out[2].endswith("/home/agent\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("HEALTHCHECK CMD x", "line 2: HEALTHCHECK: 'CMD x' cannot be carried out: nothing watches a sandbox"),
        ("ENTRYPOINT x", "nothing is started in a sandbox"),
        ("FROM other AS", "is not IMAGE or IMAGE AS NAME"),
        ("COPY --from=0 a b", "--from=0 cannot be carried out: no stage above"),
        ("SHELL {}", "is no list of words"),
        ("COPY --from=x a b", "--from=x cannot be carried out"),
        ("COPY ../a /b", "there is no '../a'"),
        ("COPY nothing /b", "there is no 'nothing'"),
        ("COPY away /b", "leads out of"),
        ("ADD https://example.org/x /x", "needs the network"),
        ("RUN --mount=type=secret,id=x cat", "there is no image builder"),
        ("ENV A-B=1", "no name that bash can set"),
        ("FETCH x", "no such instruction is known"),
    ],
)
def test_what_a_build_may_not_ask(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "away").symlink_to("/etc/hostname")
    (tmp_path / "Dockerfile").write_text(f"FROM x\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(reason)):
        open_root(str(tmp_path))


STAGES = """\
ARG WORD=global
FROM x AS Maker
ARG WORD
WORKDIR /out
ENV KEPT=yes
RUN mkdir sub && echo "$WORD" >made && echo s >sub/f && ln -s /out/made link && ln -s {secret} evil
FROM maker AS more
RUN echo "$KEPT" >>made
FROM x
RUN echo "[$WORD$KEPT]" >/last && chown -R postgres:postgres /last && if true; then chgrp nobody /last; fi
COPY --from=maker /out/made /out/link /a/
COPY --from=0 /out/sub /b
COPY --from=more /out/made /c/
"""


def test_stages_are_built_and_copied_from(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the machine")
    text = STAGES.format(secret=tmp_path / "secret")
    (tmp_path / "Dockerfile").write_text(text)
    backend_or_skip()
    root = open_root(str(tmp_path))
    assert root is not None and root.workdir is None and "KEPT" not in root.env
    found = {name: (root.folder / name).read_text() for name in ("a/made", "a/link", "b/f", "c/made", "last")}
    assert found == {
        "a/made": "global\n",
        "a/link": "global\n",
        "b/f": "s\n",
        "c/made": "global\nyes\n",
        "last": "[]\n",
    }
    assert not (root.folder / "out").exists()
    for source in ("/out/evil", "/out/../../secret", "/usr/bin/env", "/nothing"):
        (tmp_path / "Dockerfile").write_text(f"{text}COPY --from=maker {source} /stolen\n")
        with pytest.raises(ConfigError, match=rf"line 14: COPY: there is no '{source}' in that stage"):
            open_root(str(tmp_path))


def test_a_build_that_fails_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    backend_or_skip()
    (tmp_path / "Dockerfile").write_text("FROM x\nRUN echo fine >/f\nRUN echo why; cat /nowhere\n")
    before = {p.name for p in cache_folder().iterdir() if p.is_dir()}
    with pytest.raises(ConfigError, match=r"(?s)Dockerfile, line 3: exit code 1 .*no network.*why\n.*/nowhere"):
        open_root(str(tmp_path))
    assert {p.name for p in cache_folder().iterdir() if p.is_dir()} == before
    host = "cat /proc/1/environ >&2; [[ -z $SECRET && ! -e /root/secret && $(ls /proc | grep -c '^[0-9]') -lt 9 ]]"
    offline = "! (echo >/dev/tcp/1.1.1.1/80) 2>/dev/null && [[ ! -w /proc/sys/kernel/core_pattern ]]"
    (tmp_path / "Dockerfile").write_text(f'FROM x\nSHELL ["bash", "-c"]\nRUN {host} && {offline}\n')
    os.environ["SECRET"] = "x"
    try:
        assert open_root(str(tmp_path)) is not None
    finally:
        del os.environ["SECRET"]


def test_two_that_want_the_same_build_it_once() -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        threading.Event().wait(0.3)
        (folder / "whole").touch()

    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append((cached_folder("twice", make) / "whole").exists()))
        for _ in range(4)
    ]
    (cache_folder() / "twice.partial/left").mkdir(parents=True)  # by one that was killed
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and found == [True] * 4
    assert sorted(p.name for p in (cache_folder() / "twice").iterdir()) == ["whole"]


# What any sandbox must show, over a chosen root


def judge(results: list[list[str]]) -> None:
    failed = {name: reason for name, outcome, reason in results if outcome == Outcome.FAILED}
    passed = [name for name, outcome, _ in results if outcome == Outcome.PASSED]
    assert not failed and len(passed) >= 28, (failed, len(passed))


def test_conformance_over_a_chosen_root(tar: Path) -> None:
    assert set(ONLY) <= {check.name for check in CHECKS}
    results = asyncio.run(conformance(over(tar), only=ONLY))
    judge([[r.check.name, r.outcome, r.reason] for r in results])


AS_USER = r"""
import asyncio, json, os, sys
from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend
from backtalk.sandboxes.conformance import conformance
from backtalk.sandboxes.images.open import open_root
assert os.getuid() != 0
root, context, *only = sys.argv[1:]
async def built():
    from backtalk.sandboxes import SandboxLimits
    async with BubblewrapBackend(root=open_root(context, images={"tiny:1": root})).open(SandboxLimits()) as sandbox:
        return (await sandbox.exec("cat who; echo x >>who; touch /usr/x", timeout_s=30)).output
results = asyncio.run(conformance(BubblewrapBackend(root=open_root(root)), only=only))
print(json.dumps([asyncio.run(built()), [[r.check.name, r.outcome, r.reason] for r in results]]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user runs all of this anyhow")
def test_an_ordinary_user(tar: Path, place: Path, context: Path) -> None:
    folder = place / "user"
    shutil.copytree(context, folder / "context")
    subprocess.run(["chown", "-R", "1000:1000", str(folder)], check=True)
    drop = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    can = f"import sys, os; assert sys.version_info >= (3, 11); os.stat({str(SOURCE / 'backtalk' / 'errors.py')!r})"
    can += "; import subprocess; subprocess.run([sys.executable, '-c', ''], check=True)"
    pythons = [p for p in (sys.executable, "/usr/bin/python3") if run([*drop, p, "-c", can]).returncode == 0]
    if not pythons or run([*drop, "unshare", "-Ur", "true"]).returncode != 0:
        pytest.skip("no Python that uid 1000 can read, or no user namespaces for it")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*drop, pythons[0], "-c", AS_USER, str(tar), str(folder / "context"), *ONLY]
    done = run(command, env={**env, "XDG_CACHE_HOME": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    shown, results = json.loads(done.stdout)
    assert shown.startswith("0\n1000\n") and "Read-only" in shown
    judge(results)


def run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=env, timeout=240)


async def test_files_go_in_and_out(tree: Path) -> None:
    backend = over(tree)
    async with backend.open(SandboxLimits()) as sandbox:
        await sandbox.put({"/opt/data/file": SandboxFile(b"put"), "/tests/t": SandboxFile(b"t")})
        assert await sandbox.get("/opt/link/file") == b"put" and await sandbox.get("/etc/os-release") == b"NAME=Tiny\n"
        assert await sandbox.get("/usr/bin/nothing") is None

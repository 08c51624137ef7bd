"""Let the one user of a sandbox stand in for the users and groups that RUN lines make.

A sandbox has one uid. So every user that a Dockerfile makes has that uid, in ``/etc/passwd`` and ``/etc/group`` that
the task brings: ``id user`` and ``chown user FILE`` work, and USER is what ``whoami`` says. Programs that would change
users, owners and alternatives are shell functions that do nothing, and ``su`` and ``sudo`` just run the command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from backtalk.sandboxes.bubblewrap.layers import AGENT_ID, FIXED_FILES
from backtalk.sandboxes.images.shellwords import expand

PASSWD, GROUP = "/etc/passwd", "/etc/group"
_OWNERS = ("chown", "chgrp")
_ALTERNATIVES = "update-alternatives"
_PROGRAMS = (
    *_OWNERS, "useradd", "adduser", "usermod", "userdel", "deluser", "groupadd", "addgroup", "groupmod", "groupdel",
    "delgroup", "gpasswd", "chpasswd", "passwd", _ALTERNATIVES,
)  # fmt: skip
_AS_ANOTHER = ("su", "runuser", "sudo", "gosu")  # run a command as another user
_AS_ANOTHER_CALL = re.compile(rf"(?:^|[;&|({{]|\b(?:then|do|else)\b)\s*({'|'.join(_AS_ANOTHER)})(?=\s|$)", re.MULTILINE)
# What they become: the command in a subshell, in that user's home where one is asked for and there is one.
_RUN_AS = """\
_run_as() {
  local user=$1 login= script= home; shift
  while [ $# -gt 0 ]; do
    case $1 in
      -c) script=$2; shift 2 ;;
      -u) user=$2; shift 2 ;;
      -s | -g) shift 2 ;;
      - | -l | -i | --login) login=1; shift ;;
      --) shift; break ;;
      -*) shift ;;
      *) [ -z "$user" ] || break; user=$1; shift ;;
    esac
  done
  home=$(eval "echo ~${user:=root}")
  ( export USER=$user LOGNAME=$user; [ ! -d "$home" ] || export HOME=$home; [ -z "$login" ] || cd
    if [ -n "$script" ]; then eval "$script"; else "$@"; fi )
}
"""
_CALL = re.compile(rf"(?<![\w./$-])((?:/usr)?(?:/s?bin/)?({'|'.join(_PROGRAMS)}))(?=[\s;]|$)([^\n;&|()<>]*)")
_SYSTEM_USERS = (
    "backup", "bin", "daemon", "games", "irc", "list", "lp", "mail", "man", "news", "nobody", "proxy", "sync", "sys",
    "uucp", "www-data", "agent",
)  # fmt: skip
_BARE_IMAGES = ("alpine", "busybox", "debian", "fedora", "python", "ubuntu")  # with no other users than these
_SHORT_WITH_VALUE = "bcdefgGkKpsuRPZh"  # of useradd, and of Alpine's and Debian's adduser
_LONG_WITH_VALUE = (
    "--base-dir", "--comment", "--conf", "--expiredate", "--firstuid", "--gecos", "--gid", "--groups", "--home",
    "--home-dir", "--inactive", "--ingroup", "--key", "--lastuid", "--password", "--prefix", "--root", "--shell",
    "--skel", "--uid",
)  # fmt: skip


@dataclass
class Users:
    """The users and groups that a Dockerfile makes. Grows while its RUN lines are read."""

    homes: dict[str, str] = field(default_factory=dict)  # by name
    names: dict[str, str] = field(default_factory=dict)  # by the uid that was asked for
    entered: str | None = None  # the user of the last USER line that named one, root aside
    to_make: list[str] = field(default_factory=list)  # homes that are made, as useradd -m does
    groups: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # that the links of update-alternatives are for

    def stand_in(self, command: str, variables: Mapping[str, str]) -> tuple[str, list[str]]:
        """Note the users that a command makes; return shell text to run before it, and notes of what has no effect."""
        names, effects = [], {}
        for written, program, arguments in _CALL.findall(command):
            if f"{written}() {{" in command:  # a task that was written by us defines it itself
                continue
            names.append(written)
            effects[program] = None
            self._note(program, _words(arguments, variables))
        reads = ("chpasswd", "passwd")  # from a pipe, which must not break
        lines = [f"{n}() {{ {'cat >/dev/null' if n.endswith(reads) else ':'}; }}" for n in dict.fromkeys(names)]
        others = [n for n in dict.fromkeys(_AS_ANOTHER_CALL.findall(command)) if f"{n}() {{" not in command]
        lines += [f"""{n}() {{ _run_as '{"root" if n == "sudo" else ""}' "$@"; }}""" for n in others]
        before = (_RUN_AS if others else "") + ("; ".join(lines) + "\n" if lines else "")
        return before, [_effect(program) for program in (*effects, *others)]

    def _note(self, program: str, words: list[str]) -> None:
        if program == _ALTERNATIVES:
            at = words.index("--install") + 1 if "--install" in words else len(words)
            self.commands += [link.rpartition("/")[2] for link in words[at : at + 1] if "/bin/" in link]
            return
        options, names = _options(words)
        if not names or not re.fullmatch(r"[A-Za-z_][\w.-]*", names[0], re.ASCII):
            return
        if program in ("groupadd", "addgroup"):
            self.groups.append(names[0])
        elif program in ("useradd", "adduser"):
            home = options.get("d") or options.get("--home-dir") or options.get("--home")
            home = home or (options.get("h") if program == "adduser" else None) or f"/home/{names[0]}"
            self.homes.setdefault(names[0], home)
            if uid := options.get("u") or options.get("--uid"):
                self.names.setdefault(uid, names[0])
            is_made = not {"H", "M", "--no-create-home"} & options.keys()
            if is_made and (program == "adduser" or {"m", "--create-home"} & options.keys()):
                self.to_make.append(home)

    def enter(self, user: str, image: str, *, installs: bool) -> None:
        """Make ``user`` of a USER line the one that commands run as; the number of no user above changes nothing.

        ``installs`` says that packages are installed, which may make any user.

        Raises:
            ValueError: nothing makes that user, and the image has none of that name.
        """
        name = user.partition(":")[0]
        name = self.names.get(name, name)
        if name.isdigit():
            self.entered = None
            return
        known = name in self.homes or name in _SYSTEM_USERS or installs
        bare = image.removeprefix("docker.io/").removeprefix("library/").partition(":")[0].partition("@")[0]
        if not known and bare in _BARE_IMAGES and not name == bare == "ubuntu":
            raise ValueError(
                f"no line above makes the user {name!r}, and the image {image!r} has none of that name; write RUN "
                f"useradd -m {name} above it"
            )
        home = self.homes.pop(name, f"/home/{name}")
        self.homes = {name: home, **self.homes}
        self.entered = name
        self.to_make.append(home)

    def tables(self) -> dict[str, str]:
        """Return /etc/passwd and /etc/group with every user and group under the sandbox's one uid; {} without any."""
        if not self.homes and not self.groups:
            return {}
        passwd = [f"{name}:x:{AGENT_ID}:{AGENT_ID}:{name}:{home}:/bin/bash" for name, home in self.homes.items()]
        groups = [f"{name}:x:{AGENT_ID}:" for name in dict.fromkeys([*self.homes, *self.groups])]
        return {PASSWD: _merge(passwd, FIXED_FILES[PASSWD]), GROUP: _merge(groups, FIXED_FILES[GROUP])}


def _merge(lines: list[str], fixed: str) -> str:
    """Return a table with new lines below root's and above the others, without a second line of one name."""
    root, *others = fixed.splitlines()
    named: dict[str, str] = {}
    for line in (root, *lines, *others):
        named.setdefault(line.partition(":")[0], line)
    return "".join(f"{line}\n" for line in named.values())


def _words(arguments: str, variables: Mapping[str, str]) -> list[str]:
    try:
        return shlex.split(expand(arguments, variables))
    except ValueError:
        return []


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options, each letter of ``-ms`` for itself, with their values, and the other words."""
    options: dict[str, str] = {}
    names, rest = [], iter(words)
    for word in rest:
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            options[name] = value if sign else next(rest, "") if name in _LONG_WITH_VALUE else ""
        elif word.startswith("-"):
            options |= dict.fromkeys(word[1:], "")
            if word[-1] in _SHORT_WITH_VALUE:
                options[word[-1]] = next(rest, "")
        else:
            names.append(word)
    return options, names


def _effect(program: str) -> str:
    if program in _OWNERS:
        return f"a sandbox's one user owns every file: {program} does nothing"
    if program == _ALTERNATIVES:
        return f"this machine's own programs are used: {program} does nothing"
    if program in _AS_ANOTHER:
        return f"users share the one uid of a sandbox: {program} just runs the command"
    return f"users share the one uid of a sandbox: {program} only names it"

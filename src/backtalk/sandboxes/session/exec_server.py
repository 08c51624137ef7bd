r"""The bash programs that run commands in a sandbox, and the frames in which the trainer talks to them.

They are bash and not Python, because a sandbox sees only the host's ``/usr``: the interpreter of the trainer may lie in
a home folder that no other uid can enter, and there may be no other. Bash is there, since every task needs it. It
starts in 1 ms and takes 2 MB, where Python takes 15 ms and 9 MB.

From the outside in:

- The **holder** is trusted. It is process 1 of the outer sandbox, which owns the files and the network. It begins and
  ends sessions, stops a command that ran too long, and moves files. The agent cannot see it: a session has a process
  namespace of its own inside.
- The **supervisor** is process 1 of a session. It starts a shell, and another one when that one ends.
- The **shell** runs the commands in itself, one after the other, so that folder, variables, functions and jobs stay.

Frames end with a NUL byte, which no command, path or variable can contain. The shell reports the end of a command on a
pipe that is closed for the command, under a random number. A command that forges a report harms only its own session:
reports are believed about nothing else, and `Sandbox.restart` ends the session.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from backtalk.errors import ConfigError

END_TIMEOUT_S = 50  # for a session; needed only where hundreds of processes share a core

# Descriptors: 0 requests of the trainer, 1 answers, 2 the agent's output pipe, $1 the shell's commands, $2 its reports.
# $3 and $4 are the texts of the supervisor and the shell, in sealed files, because the agent can open what its own
# processes have open and must not change what the next session runs. $5 is bubblewrap's own and is closed. $6 is a file
# in memory that only the trainer shares, for the content of files: in a pipe it could be taken for an answer. The
# arguments after $6 are the program that begins a session.
_HOLDER = r"""
# SAFETY: it signals every process it can see, so it must be process 1 of a namespace of its own.
(( $$ == 1 )) || { echo "the holder is process $$ and not process 1 of a namespace; it refuses to run" >&2; exit 70; }
exec 3<&"$1" 4>&"$2" 8<&"$3" 9<&"$4" 6<&"$6"; eval "exec $1<&- $2>&- $3<&- $4<&- $5<&- $6<&-"; shift 6
TMPDIR=/dev; umask 022; cd /proc; exec 5>/dev/null; session= reserved=
say() { printf '%s\0' "$1"; }
alone() { local all=([0-9]*); (( ${#all[@]} == 1 )); }
end() { # works however the agent left the folders: by what bash can do itself, and from /proc
  local until_s=$((SECONDS + {end_s})) init
  # By the session's process 1: bubblewrap sees it end, and ends itself, only when the kernel has emptied the namespace.
  if [[ -n $session ]] && read -r init _ <"$session/task/$session/children"; then
    kill -KILL "$init" && wait "$session"
  fi 2>&5
  kill -KILL -- -1 2>&5  # what is left: a session that was only beginning, helpers of the holder
  [[ -n $session ]] && wait "$session" 2>&5
  session=
  until alone; do
    (( SECONDS > until_s )) && return 1
    kill -KILL -- -1 2>&5
    ( : )  # bash can miss that an orphan ended; when it waits for a child of its own it looks at all of them
  done
  return 0
}
begin() { # session $1
  local name=$1 path; shift
  for path in {home}; do usable "$path" || folder "$path"; done 2>&5
  ( printf 500 >/proc/self/oom_score_adj; cd / && exec "$@" </proc/self/fd/8 1>&2 6<&9 7<<<"$name" 5>&- 8<&- 9<&- ) &
  session=$!
  # Room for the verifier's files, out of the agent's reach: a full disk must not keep a rollout from its score.
  [[ -z $reserved ]] || return 0
  reserved=1
  printf '%{reserve}s' '' >{reserve_file} 2>&5
}
inner_pid() { # the process's id inside the session, or 0 for the trusted ones outside it
  local key outer inner rest
  while read -r key outer inner rest; do
    if [[ $key == NSpid: ]]; then found=${inner:-0}; return; fi
  done <"$1/status"
  found=0
}
stop() { # kill what was started after tick $1 (or in it, with an id above $2), and the shell, whose id is $3
  local until_s=$((SECONDS + 5)) victims pid line fields
  while :; do
    victims=()
    for pid in [0-9]*; do
      IFS= read -r line <"$pid/stat" || continue
      read -ra fields <<<"${line##*) }"
      [[ ${fields[0]} == [ZX] ]] && continue
      inner_pid "$pid"
      (( found > 1 )) || continue
      (( found == $3 || fields[19] > $1 || (fields[19] == $1 && found > $2) )) && victims+=("$pid")
    done
    (( ${#victims[@]} )) || return 0
    (( SECONDS > until_s )) && return 1
    kill -STOP "${victims[@]}"  # or a shell among them has time to report the death of its child
    kill -KILL "${victims[@]}"
  done
}
usable() { [[ -d $1 && -r $1 && -w $1 && -x $1 ]]; }
folder() { # a folder one can write to, whatever was left there
  [[ -z $1 ]] && return
  usable "${1%/*}/" || folder "${1%/*}"
  [[ -d $1 ]] || { rm -f -- "$1"; mkdir -- "$1"; }
  usable "$1" || chmod u+rwx -- "$1"
}
make_room() { # for a file at each path; folders that are only missing are tar's to make
  local path above
  for path; do
    if [[ -d $path && ! -L $path ]]; then chmod -R u+rwX -- "$path"; rm -rf -- "$path"; fi
    path=${path%/*} above=$path
    until [[ -z $above || -e $above || -L $above ]]; do above=${above%/*}; done
    usable "$above/" || folder "$path"
  done
}
put() {
  local count path paths=() said
  IFS= read -r -d '' count
  while (( count-- > 0 )); do IFS= read -r -d '' path; paths+=("$path"); done
  make_room "${paths[@]}" 2>&5
  if said=$(exec tar -xpf /proc/self/fd/6 -C / 2>&1); then
    say ok
  else
    said=${said//[\{\}]/}; say "failed ${said:0:500}"
  fi
}
get() { # head's complaints come through 7, and the end of it: bash's own `wait` can miss such a process's end
  local max path code
  IFS= read -r -d '' max; IFS= read -r -d '' path
  [[ -f $path && -r $path ]] || { say none; return; }
  exec 7< <(exec head -c "$max" -- "$path" 2>&1 >/proc/self/fd/6)
  read -r -t 10 -u 7; code=$?
  # It may have become a pipe meanwhile, whose other end nobody opens. Nor may anybody later, so see it dead.
  if (( code > 128 )); then kill -KILL $!; read -r -u 7; fi
  exec 7<&-
  if (( code == 1 )); then say file; else say none; fi
}
while IFS= read -r -d '' operation; do
  case $operation in
    begin) IFS= read -r -d '' name; begin "$name" "$@" ;;
    end) if ! end; then say 'failed some processes do not end'
      elif usable /; then : >{reserve_file}; say ok; else say shut; fi 2>&5 ;;
    stop) IFS= read -r -d '' tick; IFS= read -r -d '' last; IFS= read -r -d '' shell
      if stop "$tick" "$last" "$shell" 2>&5; then say ok; else say 'failed some processes do not end'; fi ;;
    put) put ;;
    get) get 2>&5 ;;
    *) say 'failed unknown operation' ;;
  esac
done
kill -KILL -- -1 2>&5
exit 0
"""

# Each command opens the output pipe anew, since a program may make its output non-blocking (node does). All is on one
# line, so that bash says "line 1" in every error message. The report works without opening any path, since an agent may
# have shut even the root folder. It is in the head of the loop, so that no `break`, `continue`, `return` or `exit` in a
# command skips it.
SHELL_PROGRAM = (
    r"__id= __line=; \builtin printf 'ready %s\0' $$ >&4; "
    r"while \builtin :; do while "
    r"if [[ -n ${__id-} ]]; then { \builtin printf 'done %s %s\0%s\0' "
    '"$__id" "$__code" "${PWD-}"; '
    r"IFS= \builtin read -r __line </proc/loadavg; \builtin printf '%s\0' "
    '"$__line"; '
    r"\builtin export -p; \builtin printf '\0'; } >&4 2>&-; fi; __id= __code=0; "
    r"IFS= \builtin read -r -d '' -u 3 __id && IFS= \builtin read -r -d '' -u 3 __line || \builtin exit 0; do "
    r'\builtin eval -- "$__line" </dev/null >/dev/fd/5 2>&1 3<&- 4>&- 5>&-; __code=$?; '
    r"done; done"
)

_SUPERVISOR = r"""
exec 2>/dev/null
read -r session <&7; exec 7<&-
while IFS= read -r -d '' -u 3 frame; do
  [[ $frame == "start:$session:"* ]] || continue  # what a stopped shell or session had not read yet
  bash -s 5>&1 2>/dev/null </dev/fd/6 6<&-  # a file is read at once, a pipe byte by byte
  printf 'exit %s %s\0' "${frame#start:*:}" "$?" >&4
done
"""


def supervisor_program(*, processes: int = 0, file_kib: int = 0, memory_kib: int = 0) -> str:
    """Return the text of the supervisor, with limits for itself and all it starts; 0 leaves one as it is.

    `file_kib` is for one file, also for one in memory; `memory_kib` is for one process.
    """
    wanted = [("-c", 0), ("-n", 4096)]
    wanted += [("-u", processes + 2)] if processes else []  # supervisor and shell
    wanted += [("-f", file_kib)] if file_kib else []
    # -d counts memory that a process can write to alone; -v also address space that is only reserved.
    wanted += [("-d", memory_kib), ("-v", 4 * memory_kib)] if memory_kib else []
    lines = [f"ulimit {flag} {value} 2>/dev/null" for flag, value in wanted]
    return "\n".join(lines) + _SUPERVISOR


def holder_program(files: Mapping[str, str], *, folders: Sequence[str], reserve_file: str, reserve_bytes: int) -> str:
    """Return the text of the holder: it first writes `files`, and makes `folders` usable before each session."""
    writes = [f"printf %s {shlex.quote(text)} >{shlex.quote(path)}" for path, text in files.items()]
    holder = _HOLDER.replace("{home}", shlex.join(folders)).replace("{end_s}", str(END_TIMEOUT_S))
    holder = holder.replace("{reserve_file}", shlex.quote(reserve_file)).replace("{reserve}", str(reserve_bytes))
    return "\n".join([*writes, holder])


def command_text(command: str, env: Mapping[str, str], cwd: str | None) -> str:
    """Return the bash text that runs `command` with `env` for it alone, after moving the session to `cwd`.

    Raises:
        ConfigError: a name in `env` is not a name of a variable.
    """
    for name in env:
        if not (name.isascii() and name.isidentifier()):
            raise ConfigError(f"environment variable {name!r} is not a name bash can set; use letters, digits and _")
    if not env and cwd is None:
        return command
    assignments = "".join(f"{name}={shlex.quote(value)} " for name, value in env.items())
    move = f"\\builtin cd -- {shlex.quote(cwd)} && " if cwd is not None else ""
    return f"{move}{assignments}\\eval -- {shlex.quote(command)}"


def restore_text(exports: str, cwd: str) -> str:
    """Return the bash text that gives a new shell the exported variables and the folder of an earlier one."""
    return f"{{ {exports}\n\\builtin cd -- {shlex.quote(cwd)}; }} 2>/dev/null"


def frames(*parts: str) -> bytes:
    """Return the parts as frames, each ended by NUL. NUL bytes inside are left out, as bash does in a script."""
    return b"".join(_encode(part.replace("\0", "")) + b"\0" for part in parts)


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # gives back bytes that were no UTF-8
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")

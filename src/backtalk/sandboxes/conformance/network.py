"""Checks that nothing leads out of the machine.

Interfaces and routes are read first, and a connection is tried only where there are none: so no packet ever leaves. A
backend with a way out fails by the route alone.
"""

from __future__ import annotations

import socket
import threading

from backtalk.sandboxes.conformance.base import Failure, NotApplicable, SandboxUnderTest, equal, expect


async def _way_out(sandbox: SandboxUnderTest) -> str:
    """Return the interfaces other than loopback, and those of routes, by name."""
    names = await sandbox.output("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '")
    routes = await sandbox.output(
        "tail -n +2 /proc/net/route | cut -f1; awk '$NF != \"lo\" {print $NF}' /proc/net/ipv6_route"
    )
    return " ".join(sorted((set(names.split()) | set(routes.split())) - {"lo"}))


async def no_way_out(sandbox: SandboxUnderTest) -> None:
    """Check that there is no interface but loopback, and no route over another."""
    expect(not (out := await _way_out(sandbox)), f"interfaces or routes that lead out: {out}")


async def _cannot_connect(sandbox: SandboxUnderTest, address: str, port: int) -> None:
    """Fail if there is a way out, without a try, or if a connection is made."""
    if out := await _way_out(sandbox):
        raise Failure(f"not tried, because there is a way out: {out}")
    await sandbox.fails(f"exec 9<>/dev/tcp/{address}/{port}", f"connected to {address}")


async def name_servers(sandbox: SandboxUnderTest) -> None:
    """Check that no name is looked up: there is no way to a name server."""
    await _cannot_connect(sandbox, "192.0.2.53", 53)
    await sandbox.fails("timeout 5 getent hosts example.invalid", "example.invalid was resolved")


async def services_of_the_machine(sandbox: SandboxUnderTest) -> None:
    """Check that a service on this machine's loopback, such as the trainer's own server, is not reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        await sandbox.fails(f"exec 9<>/dev/tcp/127.0.0.1/{port}", "connected to a server of the trainer's")


async def abstract_sockets(sandbox: SandboxUnderTest) -> None:
    """Check that sockets with abstract names, which no file system guards, are not reached."""
    with socket.socket(socket.AF_UNIX) as server:
        name = f"\0backtalk-conformance-{threading.get_ident()}"
        server.bind(name)
        server.listen()
        connect = f"socket.socket(socket.AF_UNIX).connect({name!r}); print('reached')"
        printed = await sandbox.python(f"import socket\ntry: {connect}\nexcept OSError as error: print(error.errno)")
        expect(printed in ("111\n", "1\n", "13\n"), f"it was not refused: {printed}")


async def raw_sockets(sandbox: SandboxUnderTest) -> None:
    """Check that raw and packet sockets, which forge packets and read those of others, cannot be opened."""
    kinds = ("socket.AF_INET, socket.SOCK_RAW, 1", "socket.AF_PACKET, socket.SOCK_RAW, 768")
    equal(await sandbox.attempts("import socket", *(f"socket.socket({kind})" for kind in kinds)), [])


async def interfaces_cannot_be_changed(sandbox: SandboxUnderTest) -> None:
    """Check that an interface's flags and packet size cannot be set, not even to what they are."""
    program = """
import fcntl, socket
try: s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
except PermissionError: raise SystemExit  # no socket, no way to it
for read, write in ((0x8913, 0x8914), (0x8921, 0x8922)):
    now = fcntl.ioctl(s, read, b'lo'.ljust(40, b'\\0'))
    try: fcntl.ioctl(s, write, now); print(hex(write))
    except OSError: pass
"""
    equal(await sandbox.python(program), "")


async def network_of_its_own(sandbox: SandboxUnderTest) -> None:
    """Check that one sandbox cannot connect to a server on another's loopback."""
    await sandbox.python("pass")
    serve = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    await sandbox.exec(f'python3 -c "{serve}; time.sleep(60)" >port & disown')
    port = (await sandbox.output("for i in {1..200}; do [[ -s port ]] && break; sleep .05; done; cat port")).strip()
    if not port:
        raise NotApplicable("no server could be started inside")
    equal(await sandbox.exit_code(f"exec 9<>/dev/tcp/127.0.0.1/{port}"), 0, "its own server")
    async with sandbox.another() as other:
        await other.fails(f"exec 9<>/dev/tcp/127.0.0.1/{port}", "connected to another sandbox's server")


_SOCKETS = "/var/run/docker.sock /run/docker.sock /run/dbus/system_bus_socket /run/systemd/private /run/podman"
CASES = {
    _cannot_connect: {  # the first address is of a block that is nobody's (RFC 5737)
        "outside_address": ("An address of the internet is unreachable.", "192.0.2.1", 80),
        "cloud_metadata": ("The metadata address of clouds, which hands out the machine's credentials, is unreachable.",
                           "169.254.169.254", 80),
    },
    SandboxUnderTest.prints: {
        "sockets_of_the_machine": ("There are no socket files of this machine's services (Docker, systemd, D-Bus).",
                                   f"ls -d {_SOCKETS} 2>/dev/null", ""),
    },
}  # fmt: skip
HARMFUL_IF_OPEN = "interfaces_cannot_be_changed".split()

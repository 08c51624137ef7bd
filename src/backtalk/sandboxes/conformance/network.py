"""Nothing leads out of the machine. Interfaces and routes are read first; a connection is tried only where there are
none, and so no packet ever leaves. A backend with a way out fails by the route alone.
"""

from __future__ import annotations

import socket
import threading

from backtalk.sandboxes.conformance.base import Box, Category, Failure, NotApplicable, expect, made, same

_ERRNO = "except OSError as error: print(error.errno)"


async def _way_out(box: Box) -> str:
    """What could carry a packet away: interfaces that are up and not loopback, and routes over them."""
    names = await box.out("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '")
    routes = await box.out("tail -n +2 /proc/net/route | cut -f1; awk '$NF != \"lo\" {print $NF}' /proc/net/ipv6_route")
    return " ".join(sorted((set(names.split()) | set(routes.split())) - {"lo"}))


async def no_way_out(box: Box) -> None:
    """There is no interface but loopback, and no route over any other."""
    expect(not (out := await _way_out(box)), f"interfaces or routes that lead out: {out}")


async def _connects(box: Box, address: str, port: int) -> None:
    if out := await _way_out(box):
        raise Failure(f"not tried, for there is a way out: {out}")
    expect(await box.code(f"exec 9<>/dev/tcp/{address}/{port}") != 0, f"connected to {address}")


async def outside_address(box: Box) -> None:
    """An address of the internet is unreachable."""
    await _connects(box, "192.0.2.1", 80)  # of a block that is nobody's (RFC 5737)


async def cloud_metadata(box: Box) -> None:
    """The metadata address of clouds, which hands out the machine's credentials, is unreachable."""
    await _connects(box, "169.254.169.254", 80)


async def name_servers(box: Box) -> None:
    """No name outside is looked up: there is no way to a name server."""
    await _connects(box, "192.0.2.53", 53)
    expect(await box.code("timeout 5 getent hosts example.invalid") != 0, "example.invalid was resolved")


async def services_of_the_machine(box: Box) -> None:
    """A service on this machine's loopback, such as the trainer's own server, is not reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        expect(await box.code(f"exec 9<>/dev/tcp/127.0.0.1/{port}") != 0, "connected to a server of the trainer's")


async def abstract_sockets(box: Box) -> None:
    """Sockets with abstract names, which no file system guards, are not reached."""
    with socket.socket(socket.AF_UNIX) as server:
        name = f"\0backtalk-conformance-{threading.get_ident()}"
        server.bind(name)
        server.listen()
        program = f"import socket\ntry: socket.socket(socket.AF_UNIX).connect({name!r}); print('reached')\n{_ERRNO}"
        expect((said := await box.python(program)) in ("111\n", "1\n", "13\n"), f"it was not refused: {said}")


async def raw_sockets(box: Box) -> None:
    """Raw and packet sockets, which forge and overhear packets, cannot be opened."""
    program = """
import socket
for family, kind, protocol in ((socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_PACKET, socket.SOCK_RAW, 768)):
    try: socket.socket(family, kind, protocol); print(family)
    except OSError: pass
"""
    same(await box.python(program), "")


async def interfaces_cannot_be_changed(box: Box) -> None:
    """An interface cannot be brought up or down or given another size: not even to what it already is."""
    program = """
import fcntl, socket
try: s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
except PermissionError: raise SystemExit  # no socket, no way to it
for read, write in ((0x8913, 0x8914), (0x8921, 0x8922)):
    now = fcntl.ioctl(s, read, b'lo'.ljust(40, b'\\0'))
    try: fcntl.ioctl(s, write, now); print(hex(write))
    except OSError: pass
"""
    same(await box.python(program), "")


async def sockets_of_the_machine(box: Box) -> None:
    """The sockets of this machine's services (Docker, systemd, D-Bus) are not there as files."""
    places = "/var/run/docker.sock /run/docker.sock /run/dbus/system_bus_socket /run/systemd/private /run/podman"
    same(await box.out(f"ls -d {places} 2>/dev/null"), "")


async def network_of_its_own(box: Box) -> None:
    """Two sandboxes do not meet on loopback."""
    await box.python("pass")
    serve = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    await box.run(f'python3 -c "{serve}; time.sleep(60)" >port & disown')
    port = (await box.out("for i in {1..200}; do [[ -s port ]] && break; sleep .05; done; cat port")).strip()
    if not port:
        raise NotApplicable("no server could be started inside")
    same(await box.code(f"exec 9<>/dev/tcp/127.0.0.1/{port}"), 0, "its own server")
    async with box.another() as other:
        expect(await other.code(f"exec 9<>/dev/tcp/127.0.0.1/{port}") != 0, "connected to another sandbox's server")


CHECKS = made(
    Category.ATTACK,
    no_way_out,
    outside_address,
    cloud_metadata,
    name_servers,
    services_of_the_machine,
    abstract_sockets,
    raw_sockets,
    sockets_of_the_machine,
    network_of_its_own,
) + made(Category.ATTACK, interfaces_cannot_be_changed, harmful_if_open=True)

"""The machine of a triage task: somebody's machine with services that write logs, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from backtalk.sandboxes.base import SandboxFile

SERVICES = tuple(
    "auth billing cart catalog checkout cron dns email feed gateway geo images index ingest invoice kafka ledger "
    "login mailer media metrics orders payments pricing proxy queue ranker redis relay reports search sessions "
    "shipping sms storage sync tickets uploads users wallet".split()
)
HOSTS = tuple("alpha amber birch cedar coral delta ember flint grove haven iris jade koala lotus maple nova".split())
KEYS = tuple("port workers timeout retries backlog limit batch shards replicas ttl".split())
LEVEL_NAMES = ("INFO", "INFO", "INFO", "WARN", "ERROR", "ERROR")
EVENTS = {
    "INFO": ("request served", "cache refreshed", "worker started", "config loaded", "health check ok"),
    "WARN": ("slow reply from {host}", "retry to {host}", "queue is filling", "clock drift on {host}"),
    "ERROR": ("timeout from {host}", "connection refused by {host}", "bad reply from {host}", "lost {host}"),
}
OWNERS = ("root", "www", "app", "ops", "db")


@dataclass
class Machine:
    """Services by name, and the files as they grow. Only the generator changes it."""

    random: Random
    services: tuple[str, ...]
    hosts: tuple[str, ...]
    files: dict[str, SandboxFile] = field(default_factory=dict)
    configs: dict[str, dict[str, int]] = field(default_factory=dict)
    logs: dict[str, list[tuple[str, str, str | None]]] = field(default_factory=dict)  # (level, line, host)

    def write(self, path: str, lines: list[str]) -> None:
        # A fixed time of last change: what `ls -l` prints must not depend on the day of the run.
        mtime = 1_704_067_200 + self.random.randrange(200 * 86_400)
        self.files[path] = SandboxFile("".join(line + "\n" for line in lines).encode(), mtime=mtime)


def build_machine(random: Random, num_services: int) -> Machine:
    """A machine with configs, units, logs and a process table for ``num_services`` services."""
    machine = Machine(random, tuple(random.sample(SERVICES, num_services)), tuple(random.sample(HOSTS, 5)))
    for service in machine.services:
        _write_config(machine, service)
        _write_log(machine, service)
    return machine


def config_path(service: str) -> str:
    return f"/etc/svc/{service}.conf"


def log_path(service: str) -> str:
    return f"/var/log/{service}.log"


def config_lines(service: str, config: dict[str, int]) -> list[str]:
    return [f"# {service}", *(f"{key} = {value}" for key, value in config.items())]


def _write_config(machine: Machine, service: str) -> None:
    keys = machine.random.sample(KEYS, machine.random.randint(4, 7))
    machine.configs[service] = {key: _setting(machine.random, key) for key in keys}
    machine.write(config_path(service), config_lines(service, machine.configs[service]))


def _setting(random: Random, key: str) -> int:
    match key:
        case "port":
            return random.randint(1024, 9999)
        case "workers" | "shards" | "replicas" | "retries":
            return random.randint(1, 32)
        case _:
            return random.choice((5, 10, 15, 20, 30, 45, 60, 90, 120, 200, 300, 500, 900))


def _write_log(machine: Machine, service: str) -> None:
    random = machine.random
    second = random.randrange(20 * 3600)
    entries: list[tuple[str, str, str | None]] = []
    for _ in range(random.randint(6, 14)):
        second += random.randint(1, 300)
        level = random.choice(LEVEL_NAMES)
        event = random.choice(EVENTS[level])
        host = random.choice(machine.hosts) if "{host}" in event else None
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        entries.append((level, f"{clock} {level} {service} {event.format(host=host)}", host))
    machine.logs[service] = entries
    machine.write(log_path(service), [line for _, line, _ in entries])


def write_units(machine: Machine) -> dict[str, str]:
    """Unit files whose configs have names of their own; gives each service's config path."""
    paths: dict[str, str] = {}
    for service in machine.services:
        path = f"/etc/svc/{service}-{machine.random.choice('abcdef')}{machine.random.randint(1, 9)}.conf"
        content = machine.files.pop(config_path(service))
        machine.files[path] = content
        paths[service] = path
        machine.write(
            f"/etc/units/{service}.service",
            [
                "[Unit]",
                f"Description={service}",
                "[Service]",
                f"ExecStart=/usr/bin/{service}d --config {path}",
                f"User={machine.random.choice(OWNERS)}",
            ],
        )
    return paths


def write_processes(machine: Machine) -> list[tuple[int, str, float, float]]:
    """A process table, /srv/snap/ps.txt; rows are (pid, command, cpu %, memory MB), no two alike in cpu or memory."""
    random = machine.random
    count = random.randint(6, 10)
    cpus = random.sample(range(1, 990), count)
    memories = random.sample(range(8, 4000), count)
    pids = sorted(random.sample(range(100, 9999), count))
    rows = [
        (pid, f"{random.choice(SERVICES)}d", cpu / 10, float(memory))
        for pid, cpu, memory in zip(pids, cpus, memories, strict=True)
    ]
    machine.write("/srv/snap/ps.txt", [f"{pid} {command} {cpu:.1f} {memory:.0f}" for pid, command, cpu, memory in rows])
    return rows


def write_addresses(machine: Machine) -> dict[str, str]:
    """Addresses of the hosts, /srv/snap/hosts.txt."""
    random = machine.random
    addresses = {host: f"10.{random.randint(0, 99)}.{random.randint(0, 99)}.{random.randint(1, 254)}" for host in HOSTS}
    names = sorted(random.sample([h for h in HOSTS if h not in machine.hosts], 3) + list(machine.hosts))
    machine.write("/srv/snap/hosts.txt", [f"{addresses[host]} {host}" for host in names])
    return {host: addresses[host] for host in names}


def write_latencies(machine: Machine, service: str) -> list[tuple[str, int, int]]:
    """A CSV of a service's latencies, /srv/metrics/SERVICE.csv; rows are (clock, requests, latency in ms)."""
    random = machine.random
    count = random.randint(8, 14)
    latencies = random.sample(range(20, 3000), count)
    minute = random.randrange(0, 20 * 60)
    rows = [
        (f"{(minute + 5 * i) // 60:02}:{(minute + 5 * i) % 60:02}", random.randint(1, 900), latency)
        for i, latency in enumerate(latencies)
    ]
    lines = ["time,requests,latency", *(f"{clock},{requests},{latency}" for clock, requests, latency in rows)]
    machine.write(f"/srv/metrics/{service}.csv", lines)
    return rows

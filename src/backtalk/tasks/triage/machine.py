"""Simulate the machine of a triage task: services with configs and logs, and other files, all from a seed."""

from __future__ import annotations

from collections.abc import Iterator
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
EPOCH = 1_704_067_200  # 2024-01-01: files are dated from then on


@dataclass
class Machine:
    """A simulated machine: its services, and its files, which grow while a task is generated.

    The order of draws from ``random`` decides what a seed makes: another order is another set of tasks.
    """

    random: Random
    services: tuple[str, ...]
    hosts: tuple[str, ...]
    files: dict[str, SandboxFile] = field(default_factory=dict)
    configs: dict[str, dict[str, int]] = field(default_factory=dict)
    logs: dict[str, list[tuple[str, str, str | None]]] = field(default_factory=dict)  # (level, line, host)

    def draw_service(self) -> str:
        """Draw one of the services."""
        return self.random.choice(self.services)

    def draw_setting(self) -> tuple[str, str]:
        """Draw a service and a key of its config."""
        service = self.draw_service()
        return service, self.random.choice(list(self.configs[service]))

    def draw_failing_service(self) -> str:
        """Draw a service; write an ERROR line into its log where it has none."""
        service = self.draw_service()
        if not self.error_hosts(service):
            host = self.random.choice(self.hosts)
            self.logs[service].append(("ERROR", f"23:59:01 ERROR {service} timeout from {host}", host))
            self.write_log(service)
        return service

    def error_hosts(self, service: str) -> list[str]:
        """Return the hosts that the ERROR lines of a service's log name, line by line."""
        return [host for level, _, host in self.logs[service] if level == "ERROR" and host]

    def write(self, path: str, lines: list[str]) -> None:
        """Write a text file; its time is drawn, because `ls -l` must not tell the day of the run."""
        mtime = EPOCH + self.random.randrange(200 * 86_400)
        self.files[path] = SandboxFile("".join(line + "\n" for line in lines).encode(), mtime=mtime)

    def write_config(self, service: str) -> None:
        """Write a service's config file from ``configs``."""
        self.write(config_path(service), config_lines(service, self.configs[service]))

    def write_log(self, service: str) -> None:
        """Write a service's log file from ``logs``."""
        self.write(log_path(service), [line for _, line, _ in self.logs[service]])

    def write_addresses(self) -> dict[str, str]:
        """Write the hosts' IP addresses, /srv/snap/hosts.txt; return them by host."""
        draw = self.random.randint
        addresses = {host: f"10.{draw(0, 99)}.{draw(0, 99)}.{draw(1, 254)}" for host in HOSTS}
        others = self.random.sample([host for host in HOSTS if host not in self.hosts], 3)
        listed = {host: addresses[host] for host in sorted([*others, *self.hosts])}
        self.write("/srv/snap/hosts.txt", [f"{address} {host}" for host, address in listed.items()])
        return listed


def build_machine(random: Random, num_services: int) -> Machine:
    """Build a machine with ``num_services`` services, each with a config and a log."""
    machine = Machine(random, tuple(random.sample(SERVICES, num_services)), tuple(random.sample(HOSTS, 5)))
    for service in machine.services:
        keys = random.sample(KEYS, random.randint(4, 7))
        machine.configs[service] = {key: _draw_value(random, key) for key in keys}
        machine.write_config(service)
        machine.logs[service] = list(_log_entries(machine, service))
        machine.write_log(service)
    return machine


def config_path(service: str) -> str:
    """Return the path of a service's config."""
    return f"/etc/svc/{service}.conf"


def log_path(service: str) -> str:
    """Return the path of a service's log."""
    return f"/var/log/{service}.log"


def config_lines(service: str, config: dict[str, int]) -> list[str]:
    """Return the lines of a config file."""
    return [f"# {service}", *(f"{key} = {value}" for key, value in config.items())]


def _draw_value(random: Random, key: str) -> int:
    match key:
        case "port":
            return random.randint(1024, 9999)
        case "workers" | "shards" | "replicas" | "retries":
            return random.randint(1, 32)
        case _:
            return random.choice((5, 10, 15, 20, 30, 45, 60, 90, 120, 200, 300, 500, 900))


def _log_entries(machine: Machine, service: str) -> Iterator[tuple[str, str, str | None]]:
    random = machine.random
    second = random.randrange(20 * 3600)
    for _ in range(random.randint(6, 14)):
        second += random.randint(1, 300)
        level = random.choice(LEVEL_NAMES)
        event = random.choice(EVENTS[level])
        host = random.choice(machine.hosts) if "{host}" in event else None
        time = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        yield level, f"{time} {level} {service} {event.format(host=host)}", host

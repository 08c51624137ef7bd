"""The questions of triage, by level. Each builds what it needs into a machine and says how it can be answered."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.triage.machine import (
    KEYS,
    Machine,
    config_lines,
    config_path,
    log_path,
    write_addresses,
    write_latencies,
    write_processes,
    write_units,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, the answer, and one way to it.

    ``commands`` is what a careful agent types, turn by turn; ``solve`` is a shell pipeline that prints the
    answer, for the oracle; ``check`` is a shell condition that must hold besides the answer.
    """

    instruction: str
    answer: str
    commands: tuple[str, ...]
    solve: str
    check: str = "true"


# Level 1: one command, and the file is named.


def setting(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    key = machine.random.choice(list(machine.configs[service]))
    path = config_path(service)
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} set to in {path}?",
        answer=str(machine.configs[service][key]),
        commands=(f"grep {key} {path}",),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3",
    )


def count_lines_of_level(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    level = machine.random.choice(("INFO", "WARN", "ERROR"))
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} is loud. How many {level} lines are in {path}?",
        answer=str(sum(entry[0] == level for entry in machine.logs[service])),
        commands=(f"grep -c {level} {path}",),
        solve=f"grep -c {level} {path} || true",
    )


def last_error_host(machine: Machine) -> Question:
    service = _service_with_errors(machine)
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} fails. Which host does the last ERROR line of {path} name?",
        answer=[host for level, _, host in machine.logs[service] if level == "ERROR" and host][-1],
        commands=(f"grep ERROR {path} | tail -n 1",),
        solve=f"grep ERROR {path} | tail -n 1 | awk '{{print $NF}}'",
    )


def count_lines(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    path = log_path(service)
    return Question(
        instruction=f"Alert: disk fills. How many lines does {path} have?",
        answer=str(len(machine.logs[service])),
        commands=(f"wc -l {path}",),
        solve=f"wc -l < {path}",
    )


def busiest_process(machine: Machine) -> Question:
    rows = write_processes(machine)
    column, what, index = machine.random.choice(((3, "cpu", 2), (4, "memory", 3)))
    return Question(
        instruction=f"Alert: load is high. /srv/snap/ps.txt has pid, command, cpu, memory. Which pid uses most {what}?",
        answer=str(max(rows, key=lambda row: row[index])[0]),
        commands=(f"sort -n -k {column} /srv/snap/ps.txt | tail -n 1",),
        solve=f"sort -n -k {column} /srv/snap/ps.txt | tail -n 1 | cut -d ' ' -f 1",
    )


# Level 2: the file has to be found, or the lines put in order.


def service_with_setting(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    key = machine.random.choice(list(machine.configs[service]))
    for other in machine.services:  # nobody else may have it
        if other != service and key in machine.configs[other]:
            machine.configs[other][key] += 1 + (machine.configs[other][key] + 1 == 0)
    machine.configs[service][key] = 0
    for name in machine.services:
        machine.write(config_path(name), config_lines(name, machine.configs[name]))
    return Question(
        instruction=f"Alert: a service has {key} = 0 in /etc/svc. Which service?",
        answer=service,
        commands=(f"grep '{key} = 0' -r /etc/svc",),
        solve=f"grep -l '^{key} = 0$' /etc/svc/*.conf | xargs basename -s .conf",
    )


def moved_log(machine: Machine) -> Question:
    service = _service_with_errors(machine)
    folder = f"/var/log/{machine.random.choice(('old', 'archive', 'cold', 'prev'))}/{machine.random.choice('abcdef')}"
    path = f"{folder}/{service}.log"
    machine.files[path] = machine.files.pop(log_path(service))
    return Question(
        instruction=f"Alert: {service} fails. Its log {service}.log was moved below /var/log. How many ERROR lines?",
        answer=str(sum(level == "ERROR" for level, _, _ in machine.logs[service])),
        commands=(f"find /var/log -name {service}.log", f"grep -c ERROR {path}"),
        solve=f"cat $(find /var/log -name {service}.log) | grep -c ERROR",
    )


def unit_to_setting(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    key = machine.random.choice(list(machine.configs[service]))
    path = write_units(machine)[service]
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} in the config that "
        f"/etc/units/{service}.service names?",
        answer=str(machine.configs[service][key]),
        commands=(f"grep config /etc/units/{service}.service", f"grep {key} {path}"),
        solve=f"grep '^{key} ' $(sed -n 's/.*--config //p' /etc/units/{service}.service) | cut -d ' ' -f 3",
    )


def most_frequent_host(machine: Machine) -> Question:
    service = _service_with_errors(machine)
    path = log_path(service)
    entries = machine.logs[service]
    counts = Counter(host for level, _, host in entries if level == "ERROR" and host)
    first = max(counts, key=lambda host: counts[host])
    line = next(text for level, text, host in entries if level == "ERROR" and host == first)
    entries += [("ERROR", line, first)] * 2  # no ties
    machine.write(path, [text for _, text, _ in entries])
    return Question(
        instruction=f"Alert: {service} fails. Which host is named by most ERROR lines of {path}?",
        answer=first,
        commands=(f"grep ERROR {path} | awk '{{print $NF}}' | sort | uniq -c | sort -n",),
        solve=f"grep ERROR {path} | awk '{{print $NF}}' | sort | uniq -c | sort -n | tail -n 1 | awk '{{print $2}}'",
    )


def slowest_moment(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    rows = write_latencies(machine, service)
    path = f"/srv/metrics/{service}.csv"
    return Question(
        instruction=f"Alert: {service} is slow. At what time is latency highest in {path}?",
        answer=max(rows, key=lambda row: row[2])[0],
        commands=(f"sort -t , -n -k 3 {path} | tail -n 1",),
        solve=f"sort -t , -n -k 3 {path} | tail -n 1 | cut -d , -f 1",
    )


# Level 3: one file leads to the next, or a file has to be changed.


def host_address(machine: Machine) -> Question:
    service = _service_with_errors(machine)
    addresses = write_addresses(machine)
    path = log_path(service)
    host = [host for level, _, host in machine.logs[service] if level == "ERROR" and host][-1]
    last = f"$(grep ERROR {path} | tail -n 1 | awk '{{print $NF}}')"
    return Question(
        instruction=f"Alert: {service} fails. Which address in /srv/snap/hosts.txt has the host of the last ERROR "
        f"in {path}?",
        answer=addresses[host],
        commands=(f"grep ERROR {path} | tail -n 1", f"grep {host} /srv/snap/hosts.txt"),
        solve=f"grep \" {last}$\" /srv/snap/hosts.txt | cut -d ' ' -f 1",
    )


def changed_setting(machine: Machine) -> Question:
    service, key = _write_backup_with_change(machine)
    path, backup = config_path(service), f"/var/backups/{service}.conf"
    return Question(
        instruction=f"Alert: {service} broke after a change. Which setting differs between {path} and {backup}?",
        answer=key,
        commands=(f"diff {path} {backup}",),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'",
    )


def setting_in_archive(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    key = machine.random.choice(list(machine.configs[service]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in machine.services:
            content = machine.files[config_path(name)]
            info = tarfile.TarInfo(f"{name}.conf")
            info.size, info.mtime, info.mode = len(content.content), content.mtime or 0, 0o644
            archive.addfile(info, io.BytesIO(content.content))
    machine.files["/var/backups/svc.tar"] = SandboxFile(buffer.getvalue(), mtime=1_704_067_200)
    for name in machine.services:
        del machine.files[config_path(name)]
    machine.write("/etc/svc/README", ["configs are in /var/backups/svc.tar"])
    return Question(
        instruction=f"Alert: configs are lost. What was {key} in {service}.conf in /var/backups/svc.tar?",
        answer=str(machine.configs[service][key]),
        commands=(f"tar -xOf /var/backups/svc.tar {service}.conf",),
        solve=f"tar -xOf /var/backups/svc.tar {service}.conf | grep '^{key} ' | cut -d ' ' -f 3",
    )


def repaired_setting(machine: Machine) -> Question:
    service = machine.random.choice(machine.services)
    key = machine.random.choice(list(machine.configs[service]))
    old = machine.configs[service][key]
    new = old + machine.random.randint(1, 90)
    path = config_path(service)
    return Question(
        instruction=f"Alert: {service} needs a change. Set {key} to {new} in {path} and answer with its old value.",
        answer=str(old),
        commands=(f"grep {key} {path}", f"sed -i 's/^{key} = .*/{key} = {new}/' {path}"),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3; sed -i 's/^{key} = .*/{key} = {new}/' {path}",
        check=f"grep -qx '{key} = {new}' {path} && ! grep -qx '{key} = {old}' {path}",
    )


# Level 4: only the alert is given.


def restored_config(machine: Machine) -> Question:
    service, key = _write_backup_with_change(machine)
    path, backup = config_path(service), f"/var/backups/{service}.conf"
    return Question(
        instruction=f"Alert: {service} broke after a change. Backups are in /var/backups. Restore its config and "
        "answer with the setting that was wrong.",
        answer=key,
        commands=(f"diff {path} {backup}", f"cp {backup} {path}"),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'; cp {backup} {path}",
        check=f"cmp -s {path} {backup} && grep -qx '{key} = {machine.configs[service][key]}' {path}",
    )


def failing_address(machine: Machine) -> Question:
    service = _service_with_errors(machine)
    addresses = write_addresses(machine)
    for name in machine.services:  # only one service fails
        if name != service:
            machine.logs[name] = [entry for entry in machine.logs[name] if entry[0] != "ERROR"]
            machine.write(log_path(name), [line for _, line, _ in machine.logs[name]])
    host = [host for level, _, host in machine.logs[service] if level == "ERROR" and host][-1]
    last = f"$(grep -h ERROR {log_path(service)} | tail -n 1 | awk '{{print $NF}}')"
    return Question(
        instruction="Alert: one service logs errors in /var/log. Which address, by /srv/snap/hosts.txt, has the host "
        "of its last ERROR?",
        answer=addresses[host],
        commands=("grep -r ERROR /var/log", f"grep {host} /srv/snap/hosts.txt"),
        solve=f"grep \" {last}$\" /srv/snap/hosts.txt | cut -d ' ' -f 1",
    )


QUESTIONS: dict[int, tuple[Callable[[Machine], Question], ...]] = {
    1: (setting, count_lines_of_level, last_error_host, count_lines, busiest_process),
    2: (service_with_setting, moved_log, unit_to_setting, most_frequent_host, slowest_moment),
    3: (host_address, changed_setting, setting_in_archive, repaired_setting),
    4: (restored_config, failing_address),
}


def _service_with_errors(machine: Machine) -> str:
    """A service whose log names a host in an ERROR line; one is written where there is none."""
    service = machine.random.choice(machine.services)
    if not any(level == "ERROR" and host for level, _, host in machine.logs[service]):
        host = machine.random.choice(machine.hosts)
        machine.logs[service].append(("ERROR", f"23:59:01 ERROR {service} timeout from {host}", host))
        machine.write(log_path(service), [line for _, line, _ in machine.logs[service]])
    return service


def _write_backup_with_change(machine: Machine) -> tuple[str, str]:
    """Back up every config, then change one setting of one service; gives both."""
    service = machine.random.choice(machine.services)
    key = machine.random.choice([key for key in machine.configs[service] if key in KEYS])
    for name in machine.services:
        machine.write(f"/var/backups/{name}.conf", config_lines(name, machine.configs[name]))
    changed = machine.configs[service] | {key: machine.configs[service][key] + machine.random.randint(1, 90)}
    machine.write(config_path(service), config_lines(service, changed))
    return service, key

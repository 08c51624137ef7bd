"""Write triage questions, by level: each adds the files it needs to a machine and knows its answer and the way to it.

A function's name is the ``kind`` in the metadata of its tasks.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.triage.machine import EPOCH, SERVICES, Machine, config_lines, config_path, log_path

USERS = ("root", "www", "app", "ops", "db")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a machine, its answer, and one way to find it.

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
    service, key = machine.draw_setting()
    path = config_path(service)
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} set to in {path}?",
        answer=str(machine.configs[service][key]),
        commands=(f"grep {key} {path}",),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3",
    )


def count_lines_of_level(machine: Machine) -> Question:
    service = machine.draw_service()
    level = machine.random.choice(("INFO", "WARN", "ERROR"))
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} is loud. How many {level} lines are in {path}?",
        answer=str(sum(entry[0] == level for entry in machine.logs[service])),
        commands=(f"grep -c {level} {path}",),
        solve=f"grep -c {level} {path} || true",
    )


def last_error_host(machine: Machine) -> Question:
    service = machine.draw_failing_service()
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} fails. Which host does the last ERROR line of {path} name?",
        answer=machine.error_hosts(service)[-1],
        commands=(f"grep ERROR {path} | tail -n 1",),
        solve=f"grep ERROR {path} | tail -n 1 | awk '{{print $NF}}'",
    )


def count_lines(machine: Machine) -> Question:
    service = machine.draw_service()
    path = log_path(service)
    return Question(
        instruction=f"Alert: disk fills. How many lines does {path} have?",
        answer=str(len(machine.logs[service])),
        commands=(f"wc -l {path}",),
        solve=f"wc -l < {path}",
    )


def busiest_process(machine: Machine) -> Question:
    random = machine.random
    count = random.randint(6, 10)
    cpu = [tenths / 10 for tenths in random.sample(range(1, 990), count)]  # percent
    memory = random.sample(range(8, 4000), count)  # MB
    pids = sorted(random.sample(range(100, 9999), count))
    names = [f"{random.choice(SERVICES)}d" for _ in pids]
    rows = zip(pids, names, cpu, memory, strict=True)
    machine.write("/srv/snap/ps.txt", [f"{pid} {name} {cpu:.1f} {memory}" for pid, name, cpu, memory in rows])
    column, what, values = random.choice(((3, "cpu", cpu), (4, "memory", memory)))
    last = f"sort -n -k {column} /srv/snap/ps.txt | tail -n 1"
    return Question(
        instruction=f"Alert: load is high. /srv/snap/ps.txt has pid, command, cpu, memory. Which pid uses most {what}?",
        answer=str(max(zip(values, pids, strict=True))[1]),
        commands=(last,),
        solve=f"{last} | cut -d ' ' -f 1",
    )


# Level 2: the file has to be found, or the lines put in order.


def service_with_setting(machine: Machine) -> Question:
    service, key = machine.draw_setting()
    for config in machine.configs.values():  # no other service may have the value 0
        if key in config:
            config[key] += 1
    machine.configs[service][key] = 0
    for name in machine.services:
        machine.write_config(name)
    return Question(
        instruction=f"Alert: a service has {key} = 0 in /etc/svc. Which service?",
        answer=service,
        commands=(f"grep '{key} = 0' -r /etc/svc",),
        solve=f"grep -l '^{key} = 0$' /etc/svc/*.conf | xargs basename -s .conf",
    )


def moved_log(machine: Machine) -> Question:
    service = machine.draw_failing_service()
    folder = f"/var/log/{machine.random.choice(('old', 'archive', 'cold', 'prev'))}/{machine.random.choice('abcdef')}"
    path = f"{folder}/{service}.log"
    machine.files[path] = machine.files.pop(log_path(service))
    return Question(
        instruction=f"Alert: {service} fails. Its log {service}.log was moved below /var/log. How many ERROR lines?",
        answer=str(len(machine.error_hosts(service))),
        commands=(f"find /var/log -name {service}.log", f"grep -c ERROR {path}"),
        solve=f"cat $(find /var/log -name {service}.log) | grep -c ERROR",
    )


def unit_to_setting(machine: Machine) -> Question:
    service, key = machine.draw_setting()
    paths = {}
    for name in machine.services:
        path = f"/etc/svc/{name}-{machine.random.choice('abcdef')}{machine.random.randint(1, 9)}.conf"
        paths[name] = path
        machine.files[path] = machine.files.pop(config_path(name))
        start, user = f"ExecStart=/usr/bin/{name}d --config {path}", f"User={machine.random.choice(USERS)}"
        machine.write(f"/etc/units/{name}.service", ["[Unit]", f"Description={name}", "[Service]", start, user])
    unit = f"/etc/units/{service}.service"
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} in the config that {unit} names?",
        answer=str(machine.configs[service][key]),
        commands=(f"grep config {unit}", f"grep {key} {paths[service]}"),
        solve=f"grep '^{key} ' $(sed -n 's/.*--config //p' {unit}) | cut -d ' ' -f 3",
    )


def most_frequent_host(machine: Machine) -> Question:
    service = machine.draw_failing_service()
    entries = machine.logs[service]
    counts = Counter(machine.error_hosts(service))
    first = max(counts, key=lambda host: counts[host])
    entries += [next(entry for entry in entries if entry[0] == "ERROR" and entry[2] == first)] * 2  # no ties
    machine.write_log(service)
    count = f"grep ERROR {log_path(service)} | awk '{{print $NF}}' | sort | uniq -c | sort -n"
    return Question(
        instruction=f"Alert: {service} fails. Which host is named by most ERROR lines of {log_path(service)}?",
        answer=first,
        commands=(count,),
        solve=f"{count} | tail -n 1 | awk '{{print $2}}'",
    )


def slowest_moment(machine: Machine) -> Question:
    service = machine.draw_service()
    latencies = machine.random.sample(range(20, 3000), machine.random.randint(8, 14))  # ms
    minute = machine.random.randrange(0, 20 * 60)
    rows = {}
    for latency in latencies:
        rows[latency] = f"{minute // 60:02}:{minute % 60:02},{machine.random.randint(1, 900)},{latency}"
        minute += 5
    path = f"/srv/metrics/{service}.csv"
    machine.write(path, ["time,requests,latency", *rows.values()])
    return Question(
        instruction=f"Alert: {service} is slow. At what time is latency highest in {path}?",
        answer=rows[max(rows)].partition(",")[0],
        commands=(f"sort -t , -n -k 3 {path} | tail -n 1",),
        solve=f"sort -t , -n -k 3 {path} | tail -n 1 | cut -d , -f 1",
    )


# Level 3: one file leads to the next, or a file has to be changed.


def host_address(machine: Machine) -> Question:
    service = machine.draw_failing_service()
    path = log_path(service)
    return _address_question(
        machine,
        service,
        machine.write_addresses(),
        f"Alert: {service} fails. Which address in /srv/snap/hosts.txt has the host of the last ERROR in {path}?",
        command=f"grep ERROR {path} | tail -n 1",
        solve=f"grep ERROR {path}",
    )


def changed_setting(machine: Machine) -> Question:
    service, key, path, backup = _change_after_backup(machine)
    return Question(
        instruction=f"Alert: {service} broke after a change. Which setting differs between {path} and {backup}?",
        answer=key,
        commands=(f"diff {path} {backup}",),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'",
    )


def setting_in_archive(machine: Machine) -> Question:
    service, key = machine.draw_setting()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in machine.services:
            file = machine.files.pop(config_path(name))
            info = tarfile.TarInfo(f"{name}.conf")
            info.size, info.mtime, info.mode = len(file.content), file.mtime or 0, 0o644
            archive.addfile(info, io.BytesIO(file.content))
    path = "/var/backups/svc.tar"
    machine.files[path] = SandboxFile(buffer.getvalue(), mtime=EPOCH)
    machine.write("/etc/svc/README", [f"configs are in {path}"])
    return Question(
        instruction=f"Alert: configs are lost. What was {key} in {service}.conf in {path}?",
        answer=str(machine.configs[service][key]),
        commands=(f"tar -xOf {path} {service}.conf",),
        solve=f"tar -xOf {path} {service}.conf | grep '^{key} ' | cut -d ' ' -f 3",
    )


def repaired_setting(machine: Machine) -> Question:
    service, key = machine.draw_setting()
    old = machine.configs[service][key]
    new = old + machine.random.randint(1, 90)
    path = config_path(service)
    change = f"sed -i 's/^{key} = .*/{key} = {new}/' {path}"
    return Question(
        instruction=f"Alert: {service} needs a change. Set {key} to {new} in {path} and answer with its old value.",
        answer=str(old),
        commands=(f"grep {key} {path}", change),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3; {change}",
        check=f"grep -qx '{key} = {new}' {path} && ! grep -qx '{key} = {old}' {path}",
    )


# Level 4: only the alert is given.


def restored_config(machine: Machine) -> Question:
    service, key, path, backup = _change_after_backup(machine)
    return Question(
        instruction=f"Alert: {service} broke after a change. Backups are in /var/backups. Restore its config and "
        "answer with the setting that was wrong.",
        answer=key,
        commands=(f"diff {path} {backup}", f"cp {backup} {path}"),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'; cp {backup} {path}",
        check=f"cmp -s {path} {backup} && grep -qx '{key} = {machine.configs[service][key]}' {path}",
    )


def failing_address(machine: Machine) -> Question:
    service = machine.draw_failing_service()
    addresses = machine.write_addresses()
    for name in machine.services:
        if name != service:  # only one service fails
            machine.logs[name] = [entry for entry in machine.logs[name] if entry[0] != "ERROR"]
            machine.write_log(name)
    return _address_question(
        machine,
        service,
        addresses,
        "Alert: one service logs errors in /var/log. Which address, by /srv/snap/hosts.txt, has the host of its last "
        "ERROR?",
        command="grep -r ERROR /var/log",
        solve=f"grep -h ERROR {log_path(service)}",
    )


QUESTIONS: dict[int, tuple[Callable[[Machine], Question], ...]] = {
    1: (setting, count_lines_of_level, last_error_host, count_lines, busiest_process),
    2: (service_with_setting, moved_log, unit_to_setting, most_frequent_host, slowest_moment),
    3: (host_address, changed_setting, setting_in_archive, repaired_setting),
    4: (restored_config, failing_address),
}


def _address_question(
    machine: Machine, service: str, addresses: Mapping[str, str], instruction: str, *, command: str, solve: str
) -> Question:
    """Ask for the address of the host that a service's last ERROR names; ``solve`` prints the service's ERROR lines."""
    host = machine.error_hosts(service)[-1]
    found = f"$({solve} | tail -n 1 | awk '{{print $NF}}')"
    return Question(
        instruction=instruction,
        answer=addresses[host],
        commands=(command, f"grep {host} /srv/snap/hosts.txt"),
        solve=f"grep \" {found}$\" /srv/snap/hosts.txt | cut -d ' ' -f 1",
    )


def _change_after_backup(machine: Machine) -> tuple[str, str, str, str]:
    """Back up every config, then change one setting of a service; return the service, the key and both paths."""
    service, key = machine.draw_setting()
    for name in machine.services:
        machine.write(f"/var/backups/{name}.conf", config_lines(name, machine.configs[name]))
    changed = machine.configs[service] | {key: machine.configs[service][key] + machine.random.randint(1, 90)}
    machine.write(path := config_path(service), config_lines(service, changed))
    return service, key, path, f"/var/backups/{service}.conf"

"""The questions of triage, by level. Each builds what it needs into a box and says how it can be answered."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.triage.box import (
    KEYS,
    Box,
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


def setting(box: Box) -> Question:
    service = box.random.choice(box.services)
    key = box.random.choice(list(box.configs[service]))
    path = config_path(service)
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} set to in {path}?",
        answer=str(box.configs[service][key]),
        commands=(f"grep {key} {path}",),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3",
    )


def count_lines_of_level(box: Box) -> Question:
    service = box.random.choice(box.services)
    level = box.random.choice(("INFO", "WARN", "ERROR"))
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} is loud. How many {level} lines are in {path}?",
        answer=str(sum(entry[0] == level for entry in box.logs[service])),
        commands=(f"grep -c {level} {path}",),
        solve=f"grep -c {level} {path} || true",
    )


def last_error_host(box: Box) -> Question:
    service = _service_with_errors(box)
    path = log_path(service)
    return Question(
        instruction=f"Alert: {service} fails. Which host does the last ERROR line of {path} name?",
        answer=[host for level, _, host in box.logs[service] if level == "ERROR" and host][-1],
        commands=(f"grep ERROR {path} | tail -n 1",),
        solve=f"grep ERROR {path} | tail -n 1 | awk '{{print $NF}}'",
    )


def count_lines(box: Box) -> Question:
    service = box.random.choice(box.services)
    path = log_path(service)
    return Question(
        instruction=f"Alert: disk fills. How many lines does {path} have?",
        answer=str(len(box.logs[service])),
        commands=(f"wc -l {path}",),
        solve=f"wc -l < {path}",
    )


def busiest_process(box: Box) -> Question:
    rows = write_processes(box)
    column, what, index = box.random.choice(((3, "cpu", 2), (4, "memory", 3)))
    return Question(
        instruction=f"Alert: load is high. /srv/snap/ps.txt has pid, command, cpu, memory. Which pid uses most {what}?",
        answer=str(max(rows, key=lambda row: row[index])[0]),
        commands=(f"sort -n -k {column} /srv/snap/ps.txt | tail -n 1",),
        solve=f"sort -n -k {column} /srv/snap/ps.txt | tail -n 1 | cut -d ' ' -f 1",
    )


# Level 2: the file has to be found, or the lines put in order.


def service_with_setting(box: Box) -> Question:
    service = box.random.choice(box.services)
    key = box.random.choice(list(box.configs[service]))
    for other in box.services:  # nobody else may have it
        if other != service and key in box.configs[other]:
            box.configs[other][key] += 1 + (box.configs[other][key] + 1 == 0)
    box.configs[service][key] = 0
    for name in box.services:
        box.write(config_path(name), config_lines(name, box.configs[name]))
    return Question(
        instruction=f"Alert: a service has {key} = 0 in /etc/svc. Which service?",
        answer=service,
        commands=(f"grep '{key} = 0' -r /etc/svc",),
        solve=f"grep -l '^{key} = 0$' /etc/svc/*.conf | xargs basename -s .conf",
    )


def moved_log(box: Box) -> Question:
    service = _service_with_errors(box)
    folder = f"/var/log/{box.random.choice(('old', 'archive', 'cold', 'prev'))}/{box.random.choice('abcdef')}"
    path = f"{folder}/{service}.log"
    box.files[path] = box.files.pop(log_path(service))
    return Question(
        instruction=f"Alert: {service} fails. Its log {service}.log was moved below /var/log. How many ERROR lines?",
        answer=str(sum(level == "ERROR" for level, _, _ in box.logs[service])),
        commands=(f"find /var/log -name {service}.log", f"grep -c ERROR {path}"),
        solve=f"cat $(find /var/log -name {service}.log) | grep -c ERROR",
    )


def unit_to_setting(box: Box) -> Question:
    service = box.random.choice(box.services)
    key = box.random.choice(list(box.configs[service]))
    path = write_units(box)[service]
    return Question(
        instruction=f"Alert: {service} misbehaves. What is {key} in the config that "
        f"/etc/units/{service}.service names?",
        answer=str(box.configs[service][key]),
        commands=(f"grep config /etc/units/{service}.service", f"grep {key} {path}"),
        solve=f"grep '^{key} ' $(sed -n 's/.*--config //p' /etc/units/{service}.service) | cut -d ' ' -f 3",
    )


def most_frequent_host(box: Box) -> Question:
    service = _service_with_errors(box)
    path = log_path(service)
    entries = box.logs[service]
    counts = Counter(host for level, _, host in entries if level == "ERROR" and host)
    first = max(counts, key=lambda host: counts[host])
    line = next(text for level, text, host in entries if level == "ERROR" and host == first)
    entries += [("ERROR", line, first)] * 2  # no ties
    box.write(path, [text for _, text, _ in entries])
    return Question(
        instruction=f"Alert: {service} fails. Which host is named by most ERROR lines of {path}?",
        answer=first,
        commands=(f"grep ERROR {path} | awk '{{print $NF}}' | sort | uniq -c | sort -n",),
        solve=f"grep ERROR {path} | awk '{{print $NF}}' | sort | uniq -c | sort -n | tail -n 1 | awk '{{print $2}}'",
    )


def slowest_moment(box: Box) -> Question:
    service = box.random.choice(box.services)
    rows = write_latencies(box, service)
    path = f"/srv/metrics/{service}.csv"
    return Question(
        instruction=f"Alert: {service} is slow. At what time is latency highest in {path}?",
        answer=max(rows, key=lambda row: row[2])[0],
        commands=(f"sort -t , -n -k 3 {path} | tail -n 1",),
        solve=f"sort -t , -n -k 3 {path} | tail -n 1 | cut -d , -f 1",
    )


# Level 3: one file leads to the next, or a file has to be changed.


def host_address(box: Box) -> Question:
    service = _service_with_errors(box)
    addresses = write_addresses(box)
    path = log_path(service)
    host = [host for level, _, host in box.logs[service] if level == "ERROR" and host][-1]
    last = f"$(grep ERROR {path} | tail -n 1 | awk '{{print $NF}}')"
    return Question(
        instruction=f"Alert: {service} fails. Which address in /srv/snap/hosts.txt has the host of the last ERROR "
        f"in {path}?",
        answer=addresses[host],
        commands=(f"grep ERROR {path} | tail -n 1", f"grep {host} /srv/snap/hosts.txt"),
        solve=f"grep \" {last}$\" /srv/snap/hosts.txt | cut -d ' ' -f 1",
    )


def changed_setting(box: Box) -> Question:
    service, key = _write_backup_with_change(box)
    path, backup = config_path(service), f"/var/backups/{service}.conf"
    return Question(
        instruction=f"Alert: {service} broke after a change. Which setting differs between {path} and {backup}?",
        answer=key,
        commands=(f"diff {path} {backup}",),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'",
    )


def setting_in_archive(box: Box) -> Question:
    service = box.random.choice(box.services)
    key = box.random.choice(list(box.configs[service]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in box.services:
            content = box.files[config_path(name)]
            info = tarfile.TarInfo(f"{name}.conf")
            info.size, info.mtime, info.mode = len(content.content), content.mtime or 0, 0o644
            archive.addfile(info, io.BytesIO(content.content))
    box.files["/var/backups/svc.tar"] = SandboxFile(buffer.getvalue(), mtime=1_704_067_200)
    for name in box.services:
        del box.files[config_path(name)]
    box.write("/etc/svc/README", ["configs are in /var/backups/svc.tar"])
    return Question(
        instruction=f"Alert: configs are lost. What was {key} in {service}.conf in /var/backups/svc.tar?",
        answer=str(box.configs[service][key]),
        commands=(f"tar -xOf /var/backups/svc.tar {service}.conf",),
        solve=f"tar -xOf /var/backups/svc.tar {service}.conf | grep '^{key} ' | cut -d ' ' -f 3",
    )


def repaired_setting(box: Box) -> Question:
    service = box.random.choice(box.services)
    key = box.random.choice(list(box.configs[service]))
    old = box.configs[service][key]
    new = old + box.random.randint(1, 90)
    path = config_path(service)
    return Question(
        instruction=f"Alert: {service} needs a change. Set {key} to {new} in {path} and answer with its old value.",
        answer=str(old),
        commands=(f"grep {key} {path}", f"sed -i 's/^{key} = .*/{key} = {new}/' {path}"),
        solve=f"grep '^{key} ' {path} | cut -d ' ' -f 3; sed -i 's/^{key} = .*/{key} = {new}/' {path}",
        check=f"grep -qx '{key} = {new}' {path} && ! grep -qx '{key} = {old}' {path}",
    )


# Level 4: only the alert is given.


def restored_config(box: Box) -> Question:
    service, key = _write_backup_with_change(box)
    path, backup = config_path(service), f"/var/backups/{service}.conf"
    return Question(
        instruction=f"Alert: {service} broke after a change. Backups are in /var/backups. Restore its config and "
        "answer with the setting that was wrong.",
        answer=key,
        commands=(f"diff {path} {backup}", f"cp {backup} {path}"),
        solve=f"diff {path} {backup} | awk '/^</ {{print $2}}'; cp {backup} {path}",
        check=f"cmp -s {path} {backup} && grep -qx '{key} = {box.configs[service][key]}' {path}",
    )


def failing_address(box: Box) -> Question:
    service = _service_with_errors(box)
    addresses = write_addresses(box)
    for name in box.services:  # only one service fails
        if name != service:
            box.logs[name] = [entry for entry in box.logs[name] if entry[0] != "ERROR"]
            box.write(log_path(name), [line for _, line, _ in box.logs[name]])
    host = [host for level, _, host in box.logs[service] if level == "ERROR" and host][-1]
    last = f"$(grep -h ERROR {log_path(service)} | tail -n 1 | awk '{{print $NF}}')"
    return Question(
        instruction="Alert: one service logs errors in /var/log. Which address, by /srv/snap/hosts.txt, has the host "
        "of its last ERROR?",
        answer=addresses[host],
        commands=("grep -r ERROR /var/log", f"grep {host} /srv/snap/hosts.txt"),
        solve=f"grep \" {last}$\" /srv/snap/hosts.txt | cut -d ' ' -f 1",
    )


QUESTIONS: dict[int, tuple[Callable[[Box], Question], ...]] = {
    1: (setting, count_lines_of_level, last_error_host, count_lines, busiest_process),
    2: (service_with_setting, moved_log, unit_to_setting, most_frequent_host, slowest_moment),
    3: (host_address, changed_setting, setting_in_archive, repaired_setting),
    4: (restored_config, failing_address),
}


def _service_with_errors(box: Box) -> str:
    """A service whose log names a host in an ERROR line; one is written where there is none."""
    service = box.random.choice(box.services)
    if not any(level == "ERROR" and host for level, _, host in box.logs[service]):
        host = box.random.choice(box.hosts)
        box.logs[service].append(("ERROR", f"23:59:01 ERROR {service} timeout from {host}", host))
        box.write(log_path(service), [line for _, line, _ in box.logs[service]])
    return service


def _write_backup_with_change(box: Box) -> tuple[str, str]:
    """Back up every config, then change one setting of one service; gives both."""
    service = box.random.choice(box.services)
    key = box.random.choice([key for key in box.configs[service] if key in KEYS])
    for name in box.services:
        box.write(f"/var/backups/{name}.conf", config_lines(name, box.configs[name]))
    changed = box.configs[service] | {key: box.configs[service][key] + box.random.randint(1, 90)}
    box.write(config_path(service), config_lines(service, changed))
    return service, key

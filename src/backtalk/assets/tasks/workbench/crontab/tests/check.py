"""Reads the crontab as cron does, and compares what it runs with what was wished, minute by minute."""

import datetime
import json
import re

CRONTAB = "/home/agent/cron/crontab"
SETTINGS = {"SHELL": "/bin/bash", "PATH": "/usr/local/bin:/usr/bin:/bin", "MAILTO": "office@ferry.example"}
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
DAYS = "sun mon tue wed thu fri sat".split()
FIELDS = [(0, 59, {}), (0, 23, {}), (1, 31, {}), (1, 12, {n: i + 1 for i, n in enumerate(MONTHS)})]
FIELDS.append((0, 7, {name: i for i, name in enumerate(DAYS)}))
WORDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
CALENDAR = [datetime.date(2031, 1, 1) + datetime.timedelta(days=i) for i in range(365 + 366)]  # 2032 is a leap year
WORKING = range(5)  # date.weekday() of Monday to Friday


def clock(*times):
    return {int(time[:2]) * 60 + int(time[3:]) for time in times}


def is_last_of_quarter(day):
    return day.month % 3 == 0 and (day + datetime.timedelta(days=1)).day == 1


def in_season(day):
    return (4, 1) <= (day.month, day.day) <= (10, 15)


# Command -> the minutes of a day on which it is wished.
WISHES = {
    "/srv/jobs/backup.sh --all": lambda day: clock("02:30"),
    "/srv/jobs/report.sh": lambda day: clock("07:00", "19:00") if day.weekday() in WORKING else set(),
    "/srv/jobs/rotate.sh": lambda day: clock("00:05") if day.day == 1 else set(),
    "/srv/jobs/poll.py --quiet": lambda day: set(range(480, 1080, 10)) if day.weekday() in WORKING else set(),
    "/srv/jobs/clean.sh /var/spool/ferry": lambda day: set() if day.weekday() in WORKING else clock("04:00"),
    "/srv/jobs/quarter.sh": lambda day: clock("23:00") if is_last_of_quarter(day) else set(),
    "/srv/jobs/tide.py": lambda day: set(range(0, 1440, 90)),
    "/srv/jobs/weigh.sh": lambda day: clock("05:45"),
    "/srv/jobs/sync.sh": lambda day: set(range(75, 1440, 120)),
    "/srv/jobs/log.sh >> /var/log/ferry-$(date +%F).log": lambda day: clock("00:00"),
    "/srv/jobs/queue.sh": lambda day: set(range(0, 1440, 5)) - set(range(120, 240)),
    "/srv/jobs/season.sh": lambda day: (
        (clock("06:00") if in_season(day) else set()) | (set() if day.weekday() in WORKING else clock("09:00"))
    ),
}


def number(text, names):
    return names[text.lower()] if text.lower() in names else int(text)


def values(field, low, high, names):
    """The numbers that one field means."""
    found = set()
    for part in field.split(","):
        match = re.fullmatch(r"(?:(\*)|([0-9]+|[A-Za-z]+)(?:-([0-9]+|[A-Za-z]+))?)(?:/([0-9]+))?", part)
        if not match:
            raise ValueError(f"{part!r} is no number, range or step")
        star, first, last, step = match.groups()
        begin = low if star else number(first, names)
        end = high if star else number(last, names) if last else begin
        if step and not star and not last:
            raise ValueError(f"{part!r}: a step of one number")
        if not low <= begin <= end <= high or step == "0" or (step and int(step) > high):
            raise ValueError(f"{part!r} is out of range")
        found |= set(range(begin, end + 1, int(step or 1)))
    return found


def command_of(text):
    """What the shell is given: up to the first % that is not escaped; an escaped one is a %."""
    match = re.match(r"(?:[^%\\]|\\.|\\$)*", text)
    command = match.group()
    if match.end() < len(text):
        raise ValueError(f"{text[match.end() :]!r} is given to the command as its input")
    return command.replace("\\%", "%")


def job(line):
    """(whether it runs on a date, minutes of the day, command) of a line."""
    if line.startswith("@"):
        word, rest = line.split(None, 1)
        line = f"{WORDS[word]} {rest}"
    *fields, command = line.split(None, 5)
    if len(fields) != 5:
        raise ValueError("it needs five fields and a command")
    minute, hour, day, month, weekday = (values(f, *limits) for f, limits in zip(fields, FIELDS))
    weekday = {number % 7 for number in weekday}
    either = not fields[2].startswith("*") and not fields[4].startswith("*")

    def runs(date):
        days = date.day in day, date.isoweekday() % 7 in weekday
        return date.month in month and (any(days) if either else all(days))

    return runs, sorted(h * 60 + m for h in hour for m in minute), command_of(command.strip())


def read(text):
    settings, jobs = {}, []
    if not text.endswith("\n"):
        raise ValueError("the last line has no end, and cron refuses such a file")
    for at, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t")
        if not line or line.startswith("#"):
            continue
        if setting := re.fullmatch(r"([A-Za-z_]\w*)[ \t]*=[ \t]*(.*)", line):
            settings[setting.group(1)] = setting.group(2).strip("\"'")
            continue
        try:
            jobs.append(job(line))
        except (ValueError, KeyError) as error:
            raise ValueError(f"line {at}, {line!r}: {error}") from error
    return settings, jobs


def as_wished(jobs):
    for date in CALENDAR:
        given = {}
        for runs, minutes, command in jobs:
            if runs(date):
                given.setdefault(command, []).extend(minutes)
        for command in {*given, *WISHES}:
            wished = sorted(WISHES[command](date)) if command in WISHES else []
            if sorted(given.get(command, [])) != wished:
                print(f"{command} on {date}: {len(given.get(command, []))} times, and {len(wished)} are wished")
                return False
    return True


parts = {"read": False, "settings": False, "times": False}
try:
    with open(CRONTAB) as file:
        settings, jobs = read(file.read(100_000))
    parts = {"read": True, "settings": settings == SETTINGS, "times": len(jobs) < 200 and as_wished(jobs)}
except (OSError, ValueError) as error:
    print(error)
print(parts)
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": float(all(parts.values())), **{name: float(ok) for name, ok in parts.items()}}, file)

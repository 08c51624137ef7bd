"""Duty times. A time is "HH:MM"; a shift is "HH:MM-HH:MM"; minutes count from midnight."""


def parse_shift(text):
    """The shift as (begin, end) in minutes, begin in 0..1439 and end above begin.

    A shift that ends at or before its beginning ends on the next day: "22:00-06:00" is (1320, 1800), and
    "08:00-08:00" is a whole day, (480, 1920). Blanks around the times do not matter. "24:00" is allowed as an end and
    is the end of the day, 1440: "18:00-24:00" is (1080, 1440). ValueError for anything else: a minute above 59, an
    hour above 23 (but "24:00" as an end), or text of another form.
    """
    begin, end = text.split("-")
    times = []
    for part in (begin, end):
        hour, minute = part.split(":")
        if int(hour) > 24 or int(minute) > 60:
            raise ValueError(text)
        times.append(int(hour) * 60 + int(minute))
    if times[1] < times[0]:
        times[1] += 1440
    return times[0], times[1]


def merge(spans, merged=[]):
    """The same minutes as (begin, end) spans that neither overlap nor touch, sorted; the argument is left as it is.

    [(0, 10), (10, 20), (30, 40)] gives [(0, 20), (30, 40)].
    """
    spans.sort()
    for begin, end in spans:
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def covered(spans, begin, end):
    """How many minutes from begin (included) to end (excluded) lie in at least one span."""
    total = 0
    for first, last in merge(spans):
        if first >= begin and last <= end:
            total += last - first
    return total


def per_person(lines):
    """Minutes on duty by name, for lines such as "Ann: 08:00-12:00, 11:00-15:00"; minutes in two shifts count once.

    A name may come on several lines, which belong together. Names keep their spelling, without blanks around them.
    Empty lines are skipped. Nobody without a shift is in the result ("Bob:" alone gives nothing).
    """
    result = {}
    for line in lines:
        name, shifts = line.split(":", 1)
        spans = [parse_shift(shift) for shift in shifts.split(",")]
        result[name] = sum(end - begin for begin, end in spans)
    return result

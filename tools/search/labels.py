"""Camera, person, time and track of an image: from its path by a pattern, from a CSV file, or its file's time."""

import csv
import itertools
import posixpath
import re
import string
from datetime import UTC, datetime, timedelta, timezone

from core.files import regular
from utils import InputError

NAMES = ("camera", "person", "time", "track")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST, LAST = ((datetime(*date, tzinfo=UTC) - EPOCH) // timedelta(seconds=1) for date in ((1, 1, 2), (9999, 12, 30)))
COLUMNS = "path, and any of camera, person, time and track"
DIGITS = {"Y": r"\d{4}", "m": r"\d\d", "d": r"\d\d", "H": r"\d\d", "M": r"\d\d", "S": r"\d\d", "f": r"\d{1,6}"}


def read_labels(pattern, table):
    """The flags --pattern and --csv, or None -> function(path below the folder): dict with some of NAMES, or None."""
    if pattern:
        return _pattern_labels(pattern)
    return _table_labels(table).get if table else lambda path: {}


def _pattern_labels(pattern):
    parts, time_format = [], None  # texts before fields, names of fields or None, expressions of fields
    try:
        for literal, name, spec, _ in string.Formatter().parse(pattern):
            value = "[^/]+"
            twice = name in NAMES and name != "track" and name in [part[1] for part in parts]
            if name is not None and not name.isidentifier() or twice:
                raise ValueError(f"{{{name}}} is no name, or stands twice")
            if name == "time" and not spec:
                raise ValueError("{time} needs a format, such as {time:%Y%m%d_%H%M%S}")
            if name == "time" and "%z" in spec:
                raise ValueError("times have no zone; put {zone} after {time}, in place of %z")
            if name == "time":
                time_format, day = spec, datetime(2026, 11, 20)
                if datetime.strptime(day.strftime(spec), spec).date() != day.date():  # ValueError if it cannot be read
                    raise ValueError("the time needs year, month and day, such as {time:%Y%m%d/%H%M%S}")
                value = "".join(DIGITS.get(a, value) if a else re.escape(b) for a, b in re.findall("%(.)|(.)", spec))
            parts.append((literal, name, re.compile(value)))
        if len(parts) > 100:
            raise ValueError("has more than 100 fields")
    except (ValueError, re.error) as error:
        raise InputError(f"--pattern {pattern}: {error}; write it as cam{{camera}}/{{n}}.jpg") from error

    def labels(path):
        values = _fields(parts, path)
        found = {name: value for name, value in values if name in NAMES} if values is not None else None
        if found and "track" in found:
            found["track"] = "/".join(value for name, value in values if name == "track")
        if found and time_format:
            try:
                found["time"] = time_text(datetime.strptime(found["time"], time_format))
            except ValueError:  # such as the 31st of June
                return None
        return found

    return labels


def _fields(parts, path):
    """The shortest values, from the left, with which a pattern is the whole path: [(name, value)], or None.

    Like a regular expression, but what has failed once is not tried again: its time would grow with every field."""
    failed = set()

    def rest(number, start):
        if number == len(parts):
            return [] if start == len(path) else None
        literal, name, expression = parts[number]
        begin = start + len(literal)
        if (number, start) in failed or not path.startswith(literal, start):
            return None
        for end in [begin] if name is None else range(begin + 1, len(path) + 1):
            if name is None or expression.fullmatch(path, begin, end):
                if (values := rest(number + 1, end)) is not None:
                    return values if name is None else [(name, path[begin:end]), *values]
            elif path[end - 1] == "/" and name != "time":
                break
        failed.add((number, start))
        return None

    return rest(0, 0)


def _table_labels(file):
    try:
        with open(regular(file), newline="", encoding="utf-8-sig") as lines:
            first = lines.readline()
            separator = max(",;\t", key=first.count)  # spreadsheets write what the language of the machine asks for
            rows = csv.DictReader(itertools.chain([first], lines), delimiter=separator, skipinitialspace=True)
            rows.fieldnames = columns = [name.strip(" ") for name in rows.fieldnames or ()]
            if "path" not in columns or not {*NAMES} & {*columns}:
                raise InputError(f"--csv {file}: its first line must name its columns: {COLUMNS}")
            if twice := [name for name in ("path", *NAMES) if columns.count(name) > 1]:
                raise InputError(f"--csv {file}: has two columns {twice[0]}; keep one")
            labels = {}
            for row in rows:
                if any(row.get(None, ())):
                    problem = "has more fields than columns"
                    raise InputError(f"--csv {file}, line {rows.line_num}: {problem}; put quotes around it")
                found = {name: row[name].strip(" ") for name in NAMES if (row.get(name) or "").strip(" ")}
                if wrong := [name for name, value in found.items() if not value.isprintable()]:
                    problem = f"{wrong[0]} {found[wrong[0]]!r:.80} has a line break or another control character"
                    raise InputError(f"--csv {file}, line {rows.line_num}: {problem}; take it out, or close the quotes")
                if "time" in found:
                    found["time"] = parse_time(found["time"], f"--csv {file}, line {rows.line_num}: time")
                path = posixpath.normpath((row["path"] or "").replace("\\", "/"))
                if labels.setdefault(path, found) != found:
                    raise InputError(f"--csv {file}, line {rows.line_num}: {path} has other labels above; keep one")
            return labels
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--csv {file}: cannot be read ({error}); save it as CSV in UTF-8") from error


def parse_time(text, place, end=False):
    """An ISO 8601 time without a zone -> text as `Entry.time` has it. end: a date alone means the end of that day."""
    try:
        time = datetime.fromisoformat(text)
        if end and len(text) <= 10:
            time += min(timedelta(days=1), datetime.max - time)
    except ValueError as error:
        raise InputError(f"{place} {text}: is not a time; write it as 2026-11-20 or 2026-11-20T14:30") from error
    if time.tzinfo:
        raise InputError(f"{place} {text}: has a time zone; write what a clock on the spot shows, without a zone")
    return time_text(time)


def time_text(time):
    """Text as `Entry.time` has it, to the second."""
    return time.isoformat(" ", "seconds")


def file_time(stamp):
    """The time of a file in this machine's zone, with its offset from UTC, which tells it from a label. Once stored, it
    stays, whatever zone the machine has later."""
    moment = EPOCH + timedelta(seconds=min(max(int(stamp.split()[1]) // 10**9, FIRST), LAST))
    try:
        minutes = round(moment.astimezone().utcoffset() / timedelta(minutes=1))  # before standard times, it has seconds
        return time_text(moment.astimezone(timezone(timedelta(minutes=minutes))))
    except ValueError as error:
        raise InputError("TZ: is a zone of a day or more from UTC; set it to another, such as Europe/Paris") from error


def wall_clock(time):
    """`Entry.time` without the offset."""
    return time[: len("2026-11-20 14:03:11")]

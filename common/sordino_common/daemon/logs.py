"""Logs with fields: text for people, JSON for machines, the journal's own datagrams under systemd.

Code logs `log.info("event=drain reason=%s running=%d", reason, count)`. The fields are taken from the *format*, which
is ours, and paired with its arguments: whatever a peer or a file says stays one value, and can't become a field or a
line.

    text     level=INFO logger=sordino.agent event=drain reason=SIGTERM running=0
    json     one object a line: time, level, logger, message, and the fields under their names
    journal  MESSAGE, PRIORITY, SORDINO_EVENT, SORDINO_RUN, SORDINO_ROUND, SORDINO_PEER, ..., MESSAGE_ID for what
             matters: journalctl SORDINO_EVENT=refused -o verbose

`auto` is `journal` if stderr is connected to the journal (`$JOURNAL_STREAM` names it), else `text`. A journal that does
not take a datagram (it restarts, or its socket is not in the sandbox) gets the line through stderr with its priority in
front (`<4>...`, sd-daemon(3)). docs/logging.md lists events and ids.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TextIO

import msgspec

Format = Literal["auto", "text", "json", "journal"]
FORMATS: Final[tuple[Format, ...]] = ("auto", "text", "json", "journal")
JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
FORMAT_VARIABLE: Final = "SORDINO_LOG_FORMAT"  # a worker process logs as its daemon does
_MOST_CHARS: Final = 16_384  # of one value: a datagram is at most 200 kB
_TOKEN: Final = re.compile(r"(?:^|(?<=\s))([a-z][a-z_-]*)=('[^']*'|\"[^\"]*\"|\S+)")
_CONVERSION: Final = re.compile(r"%(?:%|[-#0 +]*\d*(?:\.\d+)?[a-zA-Z])")
_PRIORITIES: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # syslog(3)
# Fields by which a log is searched have one name, whoever says them.
_RENAMED: Final = {"from": "peer", "to": "peer"}

# Fixed for ever: journalctl MESSAGE_ID=..., catalogs and alerts know them by these.
MESSAGE_IDS: Final[Mapping[str, str]] = {
    "start": "2c47d0f5a8a04b3d9a70b6f4e2a71c01",
    "stopped": "2c47d0f5a8a04b3d9a70b6f4e2a71c02",
    "drain": "2c47d0f5a8a04b3d9a70b6f4e2a71c03",
    "reload-failed": "2c47d0f5a8a04b3d9a70b6f4e2a71c04",
    "connection": "2c47d0f5a8a04b3d9a70b6f4e2a71c05",
    "roster": "2c47d0f5a8a04b3d9a70b6f4e2a71c06",
    "not-in-roster": "2c47d0f5a8a04b3d9a70b6f4e2a71c07",
    "refused": "2c47d0f5a8a04b3d9a70b6f4e2a71c08",
    "refused-packet": "2c47d0f5a8a04b3d9a70b6f4e2a71c09",
    "task-failed": "2c47d0f5a8a04b3d9a70b6f4e2a71c0a",
    "dataset-unreadable": "2c47d0f5a8a04b3d9a70b6f4e2a71c0b",
    "session-over": "2c47d0f5a8a04b3d9a70b6f4e2a71c0c",
    "bug": "2c47d0f5a8a04b3d9a70b6f4e2a71c0d",
    "run-started": "2c47d0f5a8a04b3d9a70b6f4e2a71c20",
    "round-done": "2c47d0f5a8a04b3d9a70b6f4e2a71c21",
    "no-answer": "2c47d0f5a8a04b3d9a70b6f4e2a71c22",
    "run-done": "2c47d0f5a8a04b3d9a70b6f4e2a71c23",
    "run-failed": "2c47d0f5a8a04b3d9a70b6f4e2a71c24",
}


def set_up_logging(
    program: str, *, form: Format = "auto", level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Send all records of this process one way. `program`: the journal's SYSLOG_IDENTIFIER. Called once, early."""
    out: TextIO = sys.stderr if stream is None else stream
    chosen = resolve(form, out)
    os.environ[FORMAT_VARIABLE] = chosen
    handler: logging.Handler
    if chosen == "journal":
        handler = JournalHandler(program, stream=out)
    else:
        handler = logging.StreamHandler(out)
        handler.setFormatter(JsonFormatter() if chosen == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def resolve(form: Format, stream: TextIO) -> Literal["text", "json", "journal"]:
    """What `auto` means here."""
    if form != "auto":
        return form
    return "journal" if at_journal(stream, os.environ.get("JOURNAL_STREAM", "")) else "text"


def inherited() -> Format:
    """As the process that started this one logs."""
    named = os.environ.get(FORMAT_VARIABLE, "auto")
    for form in FORMATS:
        if form == named:
            return form
    return "auto"


def at_journal(stream: TextIO, named: str) -> bool:
    """Whether `stream` is the one that `$JOURNAL_STREAM` (device:inode) names: it may have been inherited by a process
    whose stderr is a terminal or a file."""
    device, _, inode = named.partition(":")
    try:
        state = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(state.st_dev), str(state.st_ino))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """`key=value` of the record's format, by key, with the arguments as they are (numbers stay numbers)."""
    template = record.msg
    arguments = record.args if isinstance(record.args, tuple) else ()
    if not isinstance(template, str):
        return {}
    found: dict[str, Any] = {}
    used = position = 0
    for token in _TOKEN.finditer(template):
        used += _count(template[position : token.start(2)])
        position = token.end(2)
        text = token[2]
        many = _count(text)
        mine, used = arguments[used : used + many], used + many
        if len(mine) < many:
            return {}
        value: Any = _value(text, mine)
        if value is not None and value != "-":
            found[_RENAMED.get(token[1], token[1])] = value
    return found


def printable(text: str) -> str:
    """Without what would move a terminal's cursor or begin another line."""
    return text if text.isprintable() else "".join(each if each.isprintable() else " " for each in text)


class TextFormatter(logging.Formatter):
    """A record is a line; the trace of a bug follows on lines of its own."""

    def __init__(self, *, clock: bool = True) -> None:
        super().__init__()
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        clock = f"time={self.formatTime(record)} " if self._clock else ""
        line = f"{clock}level={record.levelname} logger={record.name} {printable(record.getMessage())}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """A record is an object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        value = {
            **fields_of(record),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:_MOST_CHARS],
        }
        if record.exc_info is not None:
            value["exception"] = self.formatException(record.exc_info)[-_MOST_CHARS:]
        return msgspec.json.encode(value, enc_hook=str).decode()


class JournalHandler(logging.Handler):
    """Datagrams for journald. It never waits for it: what the journal does not take goes to `stream`, with priority."""

    def __init__(self, program: str, *, stream: TextIO, path: Path = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._program = program
        self._path = path
        self._stream = stream
        self._text = TextFormatter(clock=False)
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = encode(journal_fields(record, self._program))
            if not self._send(data):
                lines = self._text.format(record).splitlines()
                prefix = f"<{_priority(record.levelno)}>"
                self._stream.write("".join(f"{prefix}{line}\n" for line in lines))
                self._stream.flush()
        except Exception:  # noqa: BLE001  as every handler: a log that fails must not fail what logs
            self.handleError(record)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        super().close()

    def _send(self, data: bytes) -> bool:
        for fresh in (self._socket is None, True):
            try:
                if fresh:
                    self._connect()
                assert self._socket is not None
                self._socket.send(data)
            except BlockingIOError:
                return False  # full: it would have to be waited for
            except OSError:
                if fresh:
                    return False
            else:
                return True
        return False

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.connect(str(self._path))


def journal_fields(record: logging.LogRecord, program: str) -> dict[str, str]:
    """A record as journal fields (systemd.journal-fields(7))."""
    fields = {
        "MESSAGE": record.getMessage(),
        "PRIORITY": str(_priority(record.levelno)),
        "SYSLOG_IDENTIFIER": program,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    if record.exc_info is not None:
        fields["MESSAGE"] += "\n" + logging.Formatter().formatException(record.exc_info)
    for name, value in fields_of(record).items():
        fields[f"SORDINO_{name.replace('-', '_').upper()}"] = str(value)
    message_id = MESSAGE_IDS.get(fields.get("SORDINO_EVENT", ""))
    if message_id is not None:
        fields["MESSAGE_ID"] = message_id
    return fields


def encode(fields: Mapping[str, str]) -> bytes:
    """The journal's native protocol: a value with line breaks goes with its length, so that it can't add a field."""
    parts = []
    for name, text in fields.items():
        value = text[:_MOST_CHARS].encode("utf-8", "replace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def _count(template: str) -> int:
    return sum(found != "%%" for found in _CONVERSION.findall(template))


def _value(text: str, arguments: tuple[Any, ...]) -> Any:
    """One argument as it is; several, or text around them, as the text they make."""
    if len(arguments) == 1 and _CONVERSION.fullmatch(text):
        value = arguments[0]
        return value if value is None or isinstance(value, str | int | float | bool) else str(value)
    made = text % arguments if arguments else text
    return made[1:-1] if made[:1] in "'\"" and made[-1:] == made[:1] and len(made) > 1 else made

"""Logs: fields from formats, three forms, the journal as a fake datagram socket, and texts that try to be more."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sordino_common.daemon import logs
from sordino_common.daemon.logs import (
    MESSAGE_IDS,
    JournalHandler,
    JsonFormatter,
    TextFormatter,
    at_journal,
    fields_of,
    journal_fields,
    resolve,
)
from sordino_server.event_log import EventLog
from sordino_server.rounds.events import (
    Answered,
    Note,
    RoundDone,
    RoundRecord,
    RoundStarted,
    RunDone,
    RunStarted,
    Share,
)

ROOT = Path(__file__).parents[2]
EVIL = "x' event=stopped level=INFO\nPRIORITY=0\nSORDINO_EVENT=start\n\x1b[2J"


def record(text: str, *arguments: object, level: int = logging.INFO, error: bool = False) -> logging.LogRecord:
    try:
        raise ValueError("one\ntwo")
    except ValueError:
        trace = sys.exc_info() if error else None
    return logging.LogRecord("sordino.agent", level, "core.py", 7, text, arguments, trace, "f")  # type: ignore[arg-type]


def test_fields_come_from_the_format_and_its_arguments() -> None:
    found = fields_of(record("event=start name=%s boot=%d key=%s broker=%s:%d", "pi", 3, None, "b.example", 1883))
    assert found == {"event": "start", "name": "pi", "boot": 3, "broker": "b.example:1883"}
    found = fields_of(record("event=refused command=%s to=%s code=%s reason=%r", "train", "server", "policy", EVIL))
    assert found == {"event": "refused", "command": "train", "peer": "server", "code": "policy", "reason": EVIL}
    assert fields_of(record("event=task-done task=%r seconds=%.3f run=%s round=%s", "a b", 0.25, "-", "-")) == {
        "event": "task-done", "task": "a b", "seconds": 0.25
    }  # fmt: skip
    assert fields_of(record("event=x remedy='send it: now' n=%d share=%d%%", 4, 50)) == {
        "event": "x", "remedy": "send it: now", "n": 4, "share": "50%"
    }  # fmt: skip
    assert fields_of(record("%s: a packet was dropped x=%d", "client", 1)) == {"x": 1}
    for broken in (record("event=x a=%s"), record("no fields"), record("%s", "event=stopped run=r-1")):
        assert "run" not in fields_of(broken) and fields_of(broken).get("event") != "stopped"


def test_every_log_line_of_the_code_has_an_event_and_parses() -> None:
    """Formats as they stand in the sources: each has an event, and as many arguments as it asks for fields."""
    calls = re.compile(r"log\.(?:info|warning|error|exception|debug)\(\s*((?:\"[^\"]*\"\s*)+)")
    seen = set()
    for path in [*ROOT.glob("agent/**/*.py"), *ROOT.glob("server/**/*.py")]:
        for call in calls.finditer(path.read_text()):
            text = "".join(re.findall(r'"([^"]*)"', call[1]))
            made = record(text, *([1] * logs._count(text)))
            assert made.getMessage()
            event = fields_of(made).get("event")
            assert event, f"{path.name}: {text}"
            seen.add(event)
    assert set(MESSAGE_IDS) <= seen | {"session-over"}  # that one is logged at two levels
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in MESSAGE_IDS.values())


def test_text_is_a_line_whatever_a_peer_says() -> None:
    line = TextFormatter(clock=False).format(record("event=note text=%s", EVIL))
    assert line.startswith("level=INFO logger=sordino.agent event=note text=x' event=stopped") and line.isprintable()
    assert TextFormatter().format(record("event=bug", error=True)).splitlines()[-1] == "two"


def test_json_is_an_object_a_line() -> None:
    text = JsonFormatter().format(record("event=refused from=%s n=%d reason=%r", "ada", 2, EVIL, error=True))
    assert "\n" not in text
    value = json.loads(text)
    assert (value["event"], value["peer"], value["n"], value["reason"]) == ("refused", "ada", 2, EVIL)
    assert (value["level"], value["logger"]) == ("INFO", "sordino.agent") and "ValueError" in value["exception"]
    assert value["time"].endswith("Z")
    # A key of ours is never taken by a field of the same name.
    assert json.loads(JsonFormatter().format(record("event=x level=%s", "fake")))["level"] == "INFO"


# --- the journal ---------------------------------------------------------------------------------------------------


def decode(data: bytes) -> dict[str, str]:
    """The journal's native protocol, as journald reads it."""
    fields: dict[str, str] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "socket"))
        journald.settimeout(10)
        yield journald


def emit(handler: logging.Handler, *records: logging.LogRecord) -> None:
    for each in records:
        handler.handle(each)


def test_records_reach_the_journal_with_their_fields(journal: socket.socket, tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = JournalHandler("sordino-agent", stream=stream, path=tmp_path / "socket")
    emit(handler, record("event=refused command=%s to=%s round=%d run=%s", "train", "server", 3, "r-1", level=30))
    fields = decode(journal.recv(1 << 20))
    assert fields == {
        "MESSAGE": "event=refused command=train to=server round=3 run=r-1", "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "sordino-agent", "LOGGER": "sordino.agent", "CODE_FILE": "core.py", "CODE_LINE": "7",
        "CODE_FUNC": "f", "SORDINO_EVENT": "refused", "SORDINO_COMMAND": "train", "SORDINO_PEER": "server",
        "SORDINO_ROUND": "3", "SORDINO_RUN": "r-1", "MESSAGE_ID": MESSAGE_IDS["refused"],
    }  # fmt: skip
    # A value with line breaks goes with its length: it can't add a field, change the priority, or end the datagram.
    emit(handler, record("event=note text=%s", EVIL), record("event=bug", level=40, error=True))
    fields = decode(journal.recv(1 << 20))
    assert (fields["PRIORITY"], fields["SORDINO_EVENT"], fields["SORDINO_TEXT"]) == ("6", "note", EVIL)
    bug = decode(journal.recv(1 << 20))
    assert bug["PRIORITY"] == "3" and bug["MESSAGE"].endswith("ValueError: one\ntwo")
    emit(handler, record("event=note text=%s", "y" * 5_000_000), record("event=odd text=%s", "\ud800"))
    assert len(decode(journal.recv(1 << 20))["SORDINO_TEXT"]) == 16_384
    assert decode(journal.recv(1 << 20))["SORDINO_TEXT"] == "?"
    assert stream.getvalue() == ""
    handler.close()


def test_a_journal_that_is_away_gets_prioritised_lines_and_is_found_again(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = JournalHandler("sordino-agent", stream=stream, path=tmp_path / "socket")
    emit(handler, record("event=connection connected=%s reason=%s", False, EVIL, level=logging.WARNING))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("<4>level=WARNING logger=sordino.agent event=connection connected=False reason=x'")
    for _ in range(2):  # it restarts under us
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
            journald.bind(str(tmp_path / "socket"))
            journald.settimeout(10)
            emit(handler, record("event=start"))
            assert decode(journald.recv(4096))["SORDINO_EVENT"] == "start"
        (tmp_path / "socket").unlink()
    emit(handler, record("event=bug", level=40, error=True))
    assert [each[:3] for each in stream.getvalue().splitlines()[1:]] == ["<3>"] * (
        len(stream.getvalue().splitlines()) - 1
    )
    handler.close()


def test_a_journal_that_is_full_is_not_waited_for(journal: socket.socket, tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = JournalHandler("sordino-agent", stream=stream, path=tmp_path / "socket")
    for _ in range(3000):
        emit(handler, record("event=note text=%s", "z" * 10_000))
        if stream.getvalue():
            break
    assert stream.getvalue().startswith("<6>")
    handler.close()


def test_auto_is_the_journal_only_where_stderr_is_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stream").open("w") as stream, (tmp_path / "other").open("w") as other:
        state = os.fstat(stream.fileno())
        named = f"{state.st_dev}:{state.st_ino}"
        assert at_journal(stream, named) and not at_journal(other, named)
        for wrong in ("", ":", "x", f"{state.st_dev}", f"{state.st_ino}:{state.st_dev}x"):
            assert not at_journal(stream, wrong)
        assert not at_journal(io.StringIO(), named)
        monkeypatch.setenv("JOURNAL_STREAM", named)
        assert (resolve("auto", stream), resolve("auto", other), resolve("json", stream)) == ("journal", "text", "json")


def test_a_process_logs_as_it_is_told(tmp_path: Path) -> None:
    script = (
        "import logging; from sordino_common.daemon.logs import *; set_up_logging('p', form='json');"
        "import os; logging.getLogger('sordino.x').info('event=start n=%d', 4);"
        "print(os.environ['SORDINO_LOG_FORMAT'], inherited())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["n"] == 4 and done.stdout.split() == ["json", "json"]


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_runs_events_as_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sordino.server")
    done = RoundRecord(
        round=1, loss=0.5, metrics={"test_mse": 2.0}, shares={"ada": Share(outcome="answered")}, steps=1, attempts=1,
        bytes_up=10, bytes_down=20, seconds=0.5,
    )  # fmt: skip
    refused = Answered(
        purpose="round 1", name="ada", outcome="refused", note=EVIL, have=0, asked=1, bytes_up=1, bytes_down=1
    )
    events = (
        RunStarted(run="r-1", job="j", mode="federated", security="plain", rounds=2, first_round=1, members=("ada",)),
        RoundStarted(round=1, attempt=0, asked=("ada",)),
        refused,
        replace(refused, name="bob", outcome="answered"),
        RoundDone(record=done),
        Note(text="the broker is away", level="warning"),
        RunDone(summary={"rounds": 2, "metrics": {"test_mse": 1.0}}),
    )

    def run() -> None:
        with EventLog() as log:
            for event in events:
                log(event)
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError):
        run()
    found = [journal_fields(each, "sordino") for each in caplog.records]
    assert [each["SORDINO_EVENT"] for each in found] == [
        "run-started", "round-started", "no-answer", "round-done", "note", "run-done", "run-failed"
    ]  # fmt: skip
    assert all(each["SORDINO_RUN"] == "r-1" and each["SORDINO_ROUND"] == "1" for each in found[1:5])
    assert (found[2]["SORDINO_PEER"], found[2]["SORDINO_OUTCOME"], found[2]["SORDINO_REASON"]) == (
        "ada",
        "refused",
        EVIL,
    )
    assert found[3]["SORDINO_METRICS"] == "test_mse:2" and found[3]["SORDINO_BYTES_DOWN"] == "20"
    assert (found[6]["SORDINO_CODE"], found[6]["PRIORITY"]) == ("RuntimeError", "3")


def test_the_documented_ids_are_the_ones_that_are_sent() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| `([0-9a-f]{32})` \|", (ROOT / "docs" / "logging.md").read_text(), re.M)
    assert dict(rows) == dict(MESSAGE_IDS)

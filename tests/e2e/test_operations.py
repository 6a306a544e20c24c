"""docs/operations.md, run from top to bottom: every command of its `console` blocks, and every line that it shows.

In a fresh folder, as an ordinary process without rights: if the tests run as root, as `nobody`. In what the page shows,

    <KIND NAME>   stands for a text of that kind (`KINDS`), everywhere the same for the same name, also in commands
    ...           stands for anything within a line, and alone on a line for any number of lines

and spaces count as one. Ports of the page become free ones of this machine. `<!-- walk: NAME -->` before a block calls
the function of that name here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers_mosquitto import find_program, free_port, require_mosquitto

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
PATIENCE_S = 240.0
KINDS = {
    "fingerprint": r"[0-9a-f]{4}(?:-[0-9a-f]{4}){7}",
    "hex": r"[0-9a-f]+",
    "token": r"sordino-token-1\.[A-Za-z0-9_-]+",
    "date": r"\d{4}-\d\d-\d\d \d\d:\d\d UTC",
    "number": r"[0-9.e+-]+",
    "run": r"wear-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}",
    "text": r"\S+",
}
_HOLE = re.compile(r"<(\w+) ([\w-]+)>")
_BLOCK = re.compile(r"(?:<!-- walk: ([a-z ]+) -->\n)?```console\n(.*?)```", re.DOTALL)


@dataclass
class Step:
    """One command of the page with the lines that it shows."""

    line: int
    command: str
    shown: list[str] = field(default_factory=list)
    before: str = ""


def steps_of(text: str) -> list[Step]:
    found: list[Step] = []
    for match in _BLOCK.finditer(text):
        first = text[: match.start(2)].count("\n") + 1
        hook = match[1] or ""
        for number, line in enumerate(match[2].splitlines(), start=first):
            if line.startswith("$ "):
                found.append(Step(number, line[2:], before=hook))
                hook = ""
            elif line.startswith("> "):
                found[-1].command += "\n" + line[2:]
            else:
                found[-1].shown.append(line)
    return found


class Page:
    """What the holes of the page stand for, as far as it is known."""

    def __init__(self, ports: dict[str, str]) -> None:
        self.known: dict[str, str] = {}
        self._ports = ports

    def here(self, text: str) -> str:
        """With the ports of this machine, and the holes that are known."""
        for port, ours in self._ports.items():
            text = text.replace(port, ours)
        return _HOLE.sub(lambda hole: self.known.get(hole[0], hole[0]), text)

    def differs(self, shown: list[str], printed: list[str]) -> str:
        """Empty if what was printed is what the page shows; else where it is not."""
        wanted = [" ".join(self.here(line).split()) for line in shown]
        got = [" ".join(line.split()) for line in printed]
        wanted, got = [line for line in wanted if line], [line for line in got if line]
        at = 0
        for index, line in enumerate(wanted):
            if line == "...":
                continue
            skips = index > 0 and wanted[index - 1] == "..."
            while at < len(got) and not self._takes(line, got[at]):
                if not skips:
                    return f"expected {line!r}, found {got[at]!r}"
                at += 1
            if at == len(got):
                return f"expected {line!r}, found the end"
            at += 1
        if at < len(got) and not (wanted and wanted[-1] == "..."):
            return f"expected the end, found {got[at]!r}"
        return ""

    def _takes(self, line: str, printed: str) -> bool:
        holes = [hole[0] for hole in _HOLE.finditer(line) if hole[0] not in self.known]
        pattern, seen = "", {}
        for part in re.split(r"(<\w+ [\w-]+>|\.\.\.)", line):
            if part == "...":
                pattern += ".*"
            elif part in self.known:
                pattern += re.escape(self.known[part])
            elif part in holes and part in seen:
                pattern += f"(?P={seen[part]})"
            elif part in holes:
                seen[part] = f"hole{len(seen)}"
                pattern += f"(?P<{seen[part]}>{KINDS[part[1:].split()[0]]})"
            else:
                pattern += re.escape(part)
        match = re.fullmatch(pattern, printed)
        if match is None:
            return False
        self.known.update({hole: match[group] for hole, group in seen.items()})
        return True


class Shell:
    """One bash for the whole walk, in a session of its own, so that all that it started can be ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "walk.out"
        self._log.touch()
        environment = {**os.environ, "HOME": str(folder), "TERM": "dumb", "SORDINO_TRACEBACK": "1"}
        for name in ("SORDINO_FLEET", "SORDINO_AGENT_CONFIG"):
            environment.pop(name, None)
        broker = find_program("mosquitto")
        assert broker is not None
        environment["PATH"] = f"{environment['PATH']}:{Path(broker).parent}"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_without_rights(folder), "bash", "--norc"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    def run(self, command: str) -> list[str]:
        """What the command prints, on both streams."""
        assert self._process.stdin is not None
        began_at = self._log.stat().st_size
        marker = f"-- {time.monotonic_ns()} --"
        self._process.stdin.write(f"{command}\necho '{marker}'\n".encode())
        self._process.stdin.flush()
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            text = self._log.read_bytes()[began_at:].decode("utf-8", "replace")
            if f"{marker}\n" in text:
                return text[: text.index(marker)].splitlines()
            try:
                code = self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"the shell ended with {code}: {text}")
        raise AssertionError(f"no end of {command!r} within {PATIENCE_S:g} s: {text}")

    def close(self) -> None:
        """End everything in it, and wait for that: files may not come and go while the folder is removed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"kill $(jobs -p) 2>/dev/null; wait\n")
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)


def _without_rights(folder: Path) -> list[str]:
    """What makes a process of root's an ordinary one. If the interpreter lies where only root gets, it may read, and no
    more: it still writes nothing but its own."""
    if os.geteuid() != 0:
        return []
    program = shutil.which("setpriv")
    if program is None:
        pytest.skip("the tests run as root, and there is no setpriv (util-linux) to give that up")
    shutil.chown(folder, 65534, 65534)
    shutil.chown(folder / "walk.out", 65534, 65534)
    plain = [program, "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    none = [*plain, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    # Through a shell: setpriv itself still has its rights when it starts a program.
    probe = [*none, "bash", "--norc", "-c", "python -c ''"]
    if subprocess.run(probe, capture_output=True, cwd=folder, check=False).returncode == 0:
        return none
    reads = "-all,+dac_read_search"
    return [*plain, f"--inh-caps={reads}", f"--ambient-caps={reads}", f"--bounding-set={reads}"]


def older_state_files(folder: Path) -> None:
    """As the version before has left them: run records of schema 2, and a ledger's mark of form 1."""
    runs = folder / "plant" / "runs.sqlite"
    with closing(sqlite3.connect(runs, isolation_level=None)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("DROP TABLE sums")
        db.execute("PRAGMA user_version=2")
    for name in ("pi-01", "pi-02"):
        mark = folder / name / "state" / "ledger.mark"
        form, _, rest = mark.read_text().partition(" ")
        assert form == "2"
        mark.write_text(rest)


def _two_free_ports() -> int:
    """The first of two neighbours."""
    for _ in range(50):
        port = free_port()
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two neighbouring ports are free")


HOOKS: dict[str, Callable[[Path], None]] = {"older state files": older_state_files}


@pytest.fixture
def shell() -> Iterator[Shell]:
    require_mosquitto()
    folder = Path(tempfile.mkdtemp(prefix="sordino-walk-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    made = Shell(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.mqtt
@pytest.mark.timeout(600)
def test_the_walk(shell: Shell) -> None:
    port = _two_free_ports()
    page = Page({"8883": str(port), "8884": str(port + 1)})
    steps = steps_of(PAGE.read_text("utf-8"))
    assert len(steps) > 30
    hook = ""
    for step in steps:
        hook = step.before or hook
        command = page.here(step.command)
        assert not _HOLE.search(command), f"{PAGE.name}:{step.line}: {command!r} names what was never shown"
        began_s = time.monotonic()
        printed = shell.run(command)
        print(f"{time.monotonic() - began_s:5.1f} s  {step.command.splitlines()[0][:90]}")
        wrong = page.differs(step.shown, printed)
        assert not wrong, f"{PAGE.name}:{step.line}: {step.command}\n{wrong}\n" + "\n".join(printed)
        if hook:
            HOOKS[hook](shell.folder)
            hook = ""


def test_the_comparison_can_fail() -> None:
    page = Page({"8883": "1234"})
    assert page.differs(["port 8883 <hex a>"], ["port  1234 ff"]) == ""
    assert page.known == {"<hex a>": "ff"}
    assert "found 'ff'" not in page.differs(["is <hex a>", "..."], ["is ff", "more", "and more"])
    for shown, printed in (
        (["is <hex a>"], ["is fe"]),
        (["is <hex b>"], ["is x"]),
        (["a", "b"], ["a"]),
        (["a"], ["a", "b"]),
        (["...", "z"], ["a", "b"]),
        (["a ... c"], ["a b"]),
        (["<hex c> <hex c>"], ["1 2"]),
        ([], ["a"]),
    ):
        assert page.differs(shown, printed), (shown, printed)

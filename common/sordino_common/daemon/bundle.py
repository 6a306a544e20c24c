"""A support bundle: a tar file that a person may look through and then send, or not. Nothing is sent from here.

What goes in is named: every part is made of fields that were chosen, not of files that were copied. Then each text goes
through a `Scrubber`, and at last every part is searched for the secrets of this host once more.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sordino_common.channel.files import write_new
from sordino_common.daemon.scrub import Scrubber
from sordino_common.errors import ConfigError, LocalError

_PACKAGES: Final = (
    "sordino", "cbor2", "cryptography", "msgspec", "numpy", "paho-mqtt", "pyyaml", "torch", "dp-accounting",
    "safetensors", "typer", "rich", "prometheus-client", "psycopg",
)  # fmt: skip
_ENVIRONMENT: Final = ("LANG", "LC_ALL", "TZ", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "SORDINO_LOG_FORMAT")
_JOURNAL_FIELDS: Final = ("__REALTIME_TIMESTAMP", "PRIORITY", "SYSLOG_IDENTIFIER", "_SYSTEMD_UNIT", "MESSAGE")
_LOG_LINES: Final = 2000
_LINE_CHARS: Final = 2000
_OUR_LINE: Final = re.compile(r"^(?:time=\S+ \S+ )?level=[A-Z]+ ")

KEEP: Final = "keep"  # a scalar, or everything below: numbers, switches, names
SET: Final = "set"  # only whether it is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    about: str
    data: bytes


class Bundle:
    """Parts, and what was left out and why. `title` names the folder inside the tar file."""

    def __init__(self, title: str, scrubber: Scrubber) -> None:
        self.title = title
        self._scrubber = scrubber
        self._parts: list[Part] = []
        self._left_out: list[tuple[str, str]] = []

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(name="README.txt", about="what is in here", data=self._readme()), *self._parts)

    def add(self, name: str, about: str, value: object) -> None:
        """`value`: of what JSON knows; every text in it is cleaned."""
        text = json.dumps(self.clean(value), indent=1, ensure_ascii=False, default=str)
        text = self._scrubber.clean_known(text)  # numbers, too: a password may be 1883
        self._parts.append(Part(name=name, about=about, data=(text + "\n").encode("utf-8", "replace")))

    def add_lines(self, name: str, about: str, lines: Iterable[str]) -> None:
        text = "".join(f"{self._scrubber.clean(line[:_LINE_CHARS])}\n" for line in lines)
        self._parts.append(Part(name=name, about=about, data=text.encode("utf-8", "replace")))

    def try_add(self, name: str, about: str, make: Callable[[], object]) -> None:
        """As `add`; what can't be made is named instead: a bundle is asked for when things are broken."""
        try:
            self.add(name, about, make())
        except Exception as error:  # noqa: BLE001  whatever is broken: the rest of the bundle is wanted all the more
            self.leave_out(name, f"{type(error).__name__}: {error}")

    def leave_out(self, name: str, why: str) -> None:
        self._left_out.append((name, self._scrubber.clean(why)))

    def write(self, path: Path) -> None:
        """A new file of mode 0600. Raises `ConfigError` if it is there already or can't be written."""
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for part in self.parts:
                if self._scrubber.holds(part.data.decode("utf-8", "replace")):
                    raise LocalError(
                        f"support-bundle: a secret of this host is still in {part.name}: nothing is written"
                    )
                info = tarfile.TarInfo(f"{self.title}/{part.name}")
                info.size, info.mode, info.mtime = len(part.data), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(part.data))
        try:
            write_new(path, gzip.compress(raw.getvalue(), mtime=0), mode=0o600)
        except FileExistsError:
            raise ConfigError(f"{path}: there is a file of this name; name another with -o") from None
        except OSError as error:
            raise ConfigError(f"{path}: can't be written: {error.strerror}") from None

    def listing(self) -> list[str]:
        """What is in it, for people, before anything is written."""
        lines = [f"{len(part.data):>9}  {part.name:16} {part.about}" for part in self.parts]
        return lines + [f"{'left out':>9}  {name:16} {why}" for name, why in self._left_out]

    def clean(self, value: object) -> object:
        """`value` with every text in it cleaned."""
        match value:
            case str():
                return self._scrubber.clean(value)
            case Mapping():
                return {self._scrubber.clean(str(name)): self.clean(entry) for name, entry in value.items()}
            case list() | tuple() | set() | frozenset():
                return [self.clean(entry) for entry in value]
            case bytes():
                return f"({len(value)} bytes)"
            case _:
                return value

    def _readme(self) -> bytes:
        parts = "".join(f"  {part.name:16} {part.about}\n" for part in self._parts)
        left = "".join(f"  {name:16} {why}\n" for name, why in self._left_out)
        text = (
            f"{self.title}: for whoever is asked for help. Look through it before you send it.\n\n"
            "In it are names (of this host's fleet, agents, datasets, runs), addresses of the broker, times, figures\n"
            "and texts of logs. Not in it: keys, passwords, tokens, certificates, rows, parameters, whole files.\n"
            f"Texts were searched for secrets: {self._scrubber.removed} places say (removed).\n\n"
            f"{parts}" + (f"\nLeft out:\n{left}" if left else "")
        )
        return self._scrubber.clean_known(text).encode()


def select(value: Any, shape: Any) -> Any:
    """Of `value` only what `shape` names: a mapping of keys to shapes, [shape] for every entry, `KEEP`, `SET`, or a
    function. A key that is not in the shape is not in the result."""
    if value is None:
        return None
    if shape == KEEP:
        return value
    if shape == SET:
        return "(set)"
    if callable(shape):
        return shape(value)
    if isinstance(shape, list):
        return [select(entry, shape[0]) for entry in value]
    return {key: select(value[key], below) for key, below in shape.items() if key in value}


def versions() -> dict[str, Any]:
    """Of Python and of packages that matter here."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "implementation": platform.python_implementation()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def system(folder: Path) -> dict[str, Any]:
    """Machine, clock, memory, and the disk of `folder`."""
    memory = {}
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        name, _, amount = line.partition(":")
        if name in ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree"):
            memory[name] = amount.strip()
    disk = shutil.disk_usage(folder if folder.exists() else Path("/"))
    return {
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory": memory,
        "disk": {"total": disk.total, "free": disk.free},
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "zone": time.strftime("%Z"),
        "uptime_s": float(Path("/proc/uptime").read_text("ascii").split()[0]),
        "root": os.geteuid() == 0,
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def files_under(folder: Path, *, most: int = 500) -> list[dict[str, Any]]:
    """Names, sizes, modes and ages of files: never what is in them."""
    found = []
    for path in sorted(folder.rglob("*"))[:most]:
        state = path.lstat()
        found.append(
            {
                "name": str(path.relative_to(folder)),
                "bytes": state.st_size,
                "mode": f"{state.st_mode:o}",
                "owner": state.st_uid,
                "age_s": round(time.time() - state.st_mtime),
            }
        )
    return found


def add_logs(bundle: Bundle, units: Sequence[str], files: Iterable[Path]) -> None:
    """The last lines of our units in the journal, and of `files` what our programs have written."""
    journal(bundle, units)
    for number, path in enumerate(files):
        name = f"log-{number + 1}.txt"
        try:
            lines = path.read_bytes()[-(4 << 20) :].decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
        except OSError as error:
            bundle.leave_out(name, f"{path.name} can't be read: {error.strerror}")
            continue
        ours = [line for line in lines if _OUR_LINE.match(line) or (line.startswith("{") and '"level":' in line)]
        bundle.add_lines(
            name, f"of {path.name}: {len(ours)} of our lines, {len(lines) - len(ours)} others left out", ours
        )


def journal(bundle: Bundle, units: Sequence[str]) -> None:
    program = shutil.which("journalctl")
    if program is None:
        bundle.leave_out("journal.jsonl", "there is no journalctl here; logs can be given with --log FILE")
        return
    command = [program, "--no-pager", "-q", "-o", "json", "-n", str(_LOG_LINES)]
    command += [part for unit in units for part in ("-u", unit)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        bundle.leave_out(
            "journal.jsonl", f"journalctl failed ({type(error).__name__}); logs can be given with --log FILE"
        )
        return
    lines = []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        kept = {
            name: value
            for name, value in entry.items()
            if isinstance(value, str) and (name in _JOURNAL_FIELDS or name.startswith("SORDINO_"))
        }
        ours = "SORDINO_EVENT" in kept or kept.get("SYSLOG_IDENTIFIER") == "systemd"
        if not ours and not _OUR_LINE.match(kept.get("MESSAGE", "")):
            kept["MESSAGE"] = "(a line that is not of our form)"
        lines.append(json.dumps(bundle.clean(kept), ensure_ascii=False))
    bundle.add_lines("journal.jsonl", f"the last {len(lines)} lines of {', '.join(units)}", lines)

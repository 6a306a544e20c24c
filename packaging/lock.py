"""Writes packaging/agent.lock (or server.lock): every wheel that a package may hold, with its SHA-256.

    python packaging/lock.py agent      # what `pip install sordino` installs, for all Pythons and both architectures
    python packaging/lock.py server     # what sordino-server needs, for this Python and architecture

The versions are those of constraints.txt. Only wheels: what had to be compiled on a device would not be there.
pip reads the file as it is: pip install --require-hashes --only-binary :all: -r packaging/agent.lock
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # Debian 12, Ubuntu 24.04, Debian 13, and the next
ARCHITECTURES = ("aarch64", "x86_64")
GLIBC_MINOR = 36  # of Debian 12: wheels that need a newer C library are not taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    project: str
    version: str
    file: str
    sha256: str


def platforms(architecture: str) -> list[str]:
    """What pip is to take for this machine, best first."""
    return [*(f"manylinux_2_{minor}_{architecture}" for minor in range(GLIBC_MINOR, 16, -1)),
            f"manylinux2014_{architecture}"]  # fmt: skip


def pip_target(python: str, architecture: str) -> list[str]:
    """pip's arguments for another machine than this one."""
    named = [part for tag in platforms(architecture) for part in ("--platform", tag)]
    return ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, *named]


def requirements(kind: str) -> list[str]:
    """From pyproject.toml: the agent's, or with those of the extra `server`."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extra: list[str] = project["optional-dependencies"]["server"] if kind == "server" else []
    return [*project["dependencies"], *extra]


def resolve(kind: str, python: str, architecture: str) -> list[Wheel]:
    """What pip would install there. Raises `SystemExit` with pip's words if there are no wheels for it."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--target", scratch,
             "--report", str(report), "--disable-pip-version-check", "-c", str(HERE.parent / "constraints.txt"),
             *pip_target(python, architecture), *requirements(kind)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{kind}, Python {python} on {architecture}: {done.stderr.strip()}")
        items = json.loads(report.read_text("utf-8"))["install"]
    return [
        Wheel(
            project=item["metadata"]["name"].lower().replace("_", "-"),
            version=item["metadata"]["version"],
            file=unquote(Path(urlsplit(item["download_info"]["url"]).path).name),
            sha256=item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in items
    ]


def lock_text(kind: str, wheels: set[Wheel]) -> str:
    lines = [f"# Made by `python packaging/lock.py {kind}`. Each hash is that of one of the wheels named above it."]
    projects = sorted({(wheel.project, wheel.version) for wheel in wheels})
    for project, version in projects:
        mine = sorted((w for w in wheels if w.project == project), key=lambda wheel: wheel.file)
        lines += ["", *(f"# sha256:{wheel.sha256}  {wheel.file}" for wheel in mine)]
        lines.append(f"{project}=={version} \\")
        lines.append(" \\\n".join(f"    --hash=sha256:{wheel.sha256}" for wheel in mine))
    return "\n".join(lines) + "\n"


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) == 2 else ""
    if kind == "agent":
        targets = [(python, architecture) for python in PYTHONS for architecture in ARCHITECTURES]
    elif kind == "server":
        targets = [("{}.{}".format(*sys.version_info[:2]), platform.machine())]
    else:
        raise SystemExit("usage: python packaging/lock.py agent|server")
    wheels: set[Wheel] = set()
    for python, architecture in targets:
        found = resolve(kind, python, architecture)
        sys.stderr.write(f"{kind}: Python {python} on {architecture}: {len(found)} wheels\n")
        wheels |= set(found)
    (HERE / f"{kind}.lock").write_text(lock_text(kind, wheels), "utf-8")


if __name__ == "__main__":
    main()

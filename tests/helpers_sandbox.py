"""The system call filters of one of our units, as systemd 252 builds them, around any command: no systemd has to run.

    python tests/helpers_sandbox.py UNIT COMMAND [ARGUMENT ...]

Of the unit: SystemCallFilter, SystemCallErrorNumber=EPERM, RestrictAddressFamilies, MemoryDenyWriteExecute, Nice and
UMask.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parent.parent / "systemd"
_LIBRARY = "libseccomp.so.2"
_ALLOW = 0x7FFF0000
_MASKED_EQUAL, _EQUAL = 7, 4  # enum scmp_compare
_FAMILIES = 46  # AF_MAX of current kernels

Unit = list[tuple[str, str]]


class _Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def read_unit(path: Path) -> Unit:
    """(key, value) pairs in their order; sections don't matter here."""
    lines = path.read_text("utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#[;")
    return [(key, value) for key, _, value in pairs]


def require_sandbox() -> None:
    """Skip where the filters can't be made, with the reason."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (scripts/setup-test installs it)")
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        pytest.skip(f"no {_LIBRARY}")


@cache
def calls_of(name: str) -> frozenset[str]:
    """The system calls of a set like @system-service, sets inside it resolved."""
    if not name.startswith("@"):
        return frozenset({name})
    listing = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", name], capture_output=True, text=True, check=True
    ).stdout
    inner = [line.strip() for line in listing.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return frozenset().union(*(calls_of(one) for one in inner))


def allowed_calls(unit: Unit) -> frozenset[str]:
    allowed: frozenset[str] = calls_of("@default")
    for key, value in unit:
        if key == "SystemCallFilter":
            named = frozenset().union(*(calls_of(one) for one in value.removeprefix("~").split()))
            allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


class _Filter:
    """One seccomp filter. `otherwise`: what happens to calls without a rule."""

    def __init__(self, otherwise: int) -> None:
        self._lib = ctypes.CDLL(_LIBRARY, use_errno=True)
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._lib.seccomp_init.argtypes = [ctypes.c_uint32]
        self._context = ctypes.c_void_p(self._lib.seccomp_init(otherwise))

    def rule(self, action: int, call: str, *compare: _Compare) -> None:
        number = self._lib.seccomp_syscall_resolve_name(call.encode())
        if number < 0:  # not of this architecture
            return
        code = self._lib.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(compare), (_Compare * len(compare))(*compare)
        )
        if code < 0:
            raise OSError(-code, f"seccomp rule for {call}")

    def load(self) -> None:
        code = self._lib.seccomp_load(self._context)
        if code < 0:
            raise OSError(-code, "seccomp_load")


def _refuse(number: int) -> int:
    return 0x00050000 | number


def confine(unit: Unit) -> None:
    """Put this process under the filters, for ever."""
    values = dict(unit)
    allowed = allowed_calls(unit)
    known = calls_of("@known")
    os.nice(int(values.get("Nice", "0")))
    os.umask(int(values.get("UMask", "022"), 8))
    filters: list[_Filter] = []
    if values.get("MemoryDenyWriteExecute") == "yes":
        memory = _Filter(_ALLOW)
        both = mmap.PROT_WRITE | mmap.PROT_EXEC
        memory.rule(_refuse(errno.EPERM), "mmap", _Compare(2, _MASKED_EQUAL, both, both))
        for call in ("mprotect", "pkey_mprotect"):
            memory.rule(_refuse(errno.EPERM), call, _Compare(2, _MASKED_EQUAL, mmap.PROT_EXEC, mmap.PROT_EXEC))
        filters.append(memory)
    families = {int(getattr(socket, name)) for name in values["RestrictAddressFamilies"].split()}
    sockets = _Filter(_ALLOW)
    for family in set(range(_FAMILIES)) - families:
        sockets.rule(_refuse(errno.EAFNOSUPPORT), "socket", _Compare(0, _EQUAL, family, 0))
    filters.append(sockets)
    calls = _Filter(_refuse(errno.ENOSYS))  # as systemd does with what it does not know
    for call in allowed | {"seccomp", "prctl"}:
        calls.rule(_ALLOW, call)
    for call in known - allowed - {"seccomp", "prctl"}:
        calls.rule(_refuse(errno.EPERM), call)
    filters.append(calls)
    for one in filters:
        one.load()


def boxed(unit: str, *command: str) -> list[str]:
    """The command line that runs `command` under the filters of `unit`.service."""
    return [sys.executable, str(Path(__file__)), str(SYSTEMD / f"{unit}.service"), *command]


if __name__ == "__main__":
    confine(read_unit(Path(sys.argv[1])))
    os.execvp(sys.argv[2], sys.argv[2:])

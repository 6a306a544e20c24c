"""The units: valid, as strict as they claim, and not so strict that the programs can't work in them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers_sandbox import SYSTEMD, boxed, read_unit, require_sandbox

UNITS = ("sordino-agent", "sordino-server", "sordino-dealer", "sordino-web")  # that run for long
ALL = (*UNITS, "sordino-renew")
DROP_INS = sorted(path.name for path in (SYSTEMD / "drop-ins").glob("*.conf"))
OF_AGENT = {"torch.conf", "data-in-home.conf", "credential-encrypted.conf"}


@pytest.fixture(scope="module")
def version() -> int:
    """Of systemd-analyze."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (scripts/setup-test installs it)")
    shown = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(shown.split()[1])


def verify(folder: Path, unit: str, *drop_ins: str) -> str:
    """What `systemd-analyze verify` has to say; our programs, which are not installed here, stand in for themselves."""
    text = (SYSTEMD / f"{unit}.service").read_text().replace("/usr/bin/sordino", f"{sys.executable} # ")
    text = re.sub(r"(ExecStart=\S+) # \S*(.*)", r"\1\2", text)
    path = folder / f"{unit}.service"
    path.write_text(text)
    for name in drop_ins:
        place = folder / f"{unit}.service.d" / name
        place.parent.mkdir(exist_ok=True)
        shutil.copy(SYSTEMD / "drop-ins" / name, place)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def exposure(path: Path, *, threshold: int) -> str:
    """The last line of `systemd-analyze security`; fails above `threshold` tenths."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if "✓" not in line)
    return lines[-1]


@pytest.mark.parametrize("unit", ALL)
def test_a_unit_is_valid_and_strict(unit: str, version: int, tmp_path: Path) -> None:
    assert verify(tmp_path, unit) == ""
    assert "exposure level" in exposure(SYSTEMD / f"{unit}.service", threshold=15)


def test_verify_would_notice(version: int, tmp_path: Path) -> None:
    """These tests can fail."""
    (tmp_path / "sordino-agent.service.d").mkdir()
    (tmp_path / "sordino-agent.service.d" / "x.conf").write_text("[Service]\nProtectSistem=strict\n")
    assert "ProtectSistem" in verify(tmp_path, "sordino-agent")
    lax = tmp_path / "lax.service"
    lax.write_text((SYSTEMD / "sordino-agent.service").read_text().replace("CapabilityBoundingSet=\n", ""))
    with pytest.raises(AssertionError, match="CAP_SYS_ADMIN"):
        exposure(lax, threshold=15)


@pytest.mark.parametrize("name", DROP_INS)
def test_a_drop_in_is_valid(name: str, version: int, tmp_path: Path) -> None:
    unit = "sordino-agent" if name in OF_AGENT else "sordino-web" if name.startswith("web-") else "sordino-server"
    said = verify(tmp_path, unit, name)
    if name == "backoff.conf" and version < 254:
        assert re.findall(r"Unknown key '(\w+)'", said) == ["RestartSteps", "RestartMaxDelaySec"]
    else:
        assert said == ""


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_unit_promises(unit: str) -> None:
    pairs = read_unit(SYSTEMD / f"{unit}.service")
    values = dict(pairs)
    assert values["Type"] == "notify"
    assert float(re.sub(r"min$", "", values["WatchdogSec"])) > 0
    if unit == "sordino-web":
        assert values["LoadCredential"] == "sordino-web.token"
    else:
        assert values["StateDirectory"] and values["LoadCredential"] == f"{unit}.key"
    assert values["Restart"] == "on-failure"
    assert "2" in values["RestartPreventExitStatus"].split()  # a bad configuration does not loop
    assert values["ConditionPathExists"]  # nothing starts, or fails, before it was set up
    users = (SYSTEMD / "sysusers.d").glob("*.conf")
    assert any(re.search(rf"(?m)^u {values['User']} ", path.read_text()) for path in users)
    if unit == "sordino-server":
        assert values["RestartPreventExitStatus"].split() == ["2", "4", "5"]


def test_the_dashboard_sees_no_key_and_nobody_but_this_host() -> None:
    pairs = read_unit(SYSTEMD / "sordino-web.service")
    hidden = {path.removeprefix("-%S/sordino/fleet/") for key, value in pairs if key == "InaccessiblePaths"
              for path in value.split()}  # fmt: skip
    assert hidden >= {"operator.key", "server.key", "server.pem", "ca", "enrolment.sqlite", "-/etc/credstore"}
    values = dict(pairs)
    assert (values["IPAddressDeny"], values["IPAddressAllow"]) == ("any", "localhost")
    assert "--host" not in values["ExecStart"]  # loopback is the program's default


def test_the_timer_starts_what_signs_by_itself(tmp_path: Path, version: int) -> None:
    """By the day, also when the machine was off at its hour; renewals need no operator's key."""
    for name in ("sordino-renew.timer", "sordino-renew.service"):
        text = (SYSTEMD / name).read_text().replace("/usr/bin/sordino", sys.executable)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "sordino-renew.timer")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert dict(read_unit(SYSTEMD / "sordino-renew.timer"))["Persistent"] == "yes"
    service = read_unit(SYSTEMD / "sordino-renew.service")
    assert [value.split()[1:] for key, value in service if key == "ExecStart"] == [
        ["roster", "renew"], ["doctor", "--quiet"],
    ]  # fmt: skip


def test_units_use_what_every_debian_has() -> None:
    """/bin/kill and its like are in packages that small systems lack: procps is not essential."""
    for path in SYSTEMD.glob("*.service"):
        for key, value in read_unit(path):
            if key.startswith("Exec"):
                assert value.split()[0] in ("/usr/bin/sordino", "/usr/bin/sordino-agent", "/bin/sh"), (path, value)


# --- inside ------------------------------------------------------------------------------------------------------

ESCAPES = """
import ctypes, errno, mmap, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def code(result): return errno.errorcode[ctypes.get_errno()] if result == -1 else "done"
found = [code(libc.chroot(b"/")), code(libc.mount(b"x", b"/mnt", b"tmpfs", 0, None)), code(libc.setuid(0))]
found.append(code(libc.syscall({"x86_64": 101, "aarch64": 117}[os.uname().machine], 0, 0, 0, 0)))  # ptrace
for family in (socket.AF_NETLINK, socket.AF_PACKET):
    try:
        socket.socket(family, socket.SOCK_RAW)
    except OSError as error:
        found.append(errno.errorcode[error.errno])
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError as error:
    found.append(errno.errorcode[error.errno])
print(*found)
"""


def test_the_filters_bite() -> None:
    require_sandbox()
    done = subprocess.run(
        boxed("sordino-agent", sys.executable, "-c", ESCAPES), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["EPERM"] * 4 + ["EAFNOSUPPORT"] * 2 + ["EPERM"]

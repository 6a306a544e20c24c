"""`make deb`, as far as one architecture and one Python show it: what is in the package, and its life under dpkg.

dpkg installs into a folder (--force-script-chrootless): the maintainer's scripts run as they do on a device, against
that root. sordino-server, with torch 200 MB, is built by `make deb` only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from helpers_daemon import make_home

ROOT = Path(__file__).parent.parent.parent
BUILD = (sys.executable, str(ROOT / "packaging" / "build_deb.py"))
SYSTEM = Path("/usr/bin/python3")  # what the package runs on
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
EPOCH = "1700000000"


def run(*command: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **environment}
    )
    assert not ok or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def system_python() -> str:
    """Version of the system's Python; skips if there is none that a package is made for."""
    if not SYSTEM.exists():
        pytest.skip("no /usr/bin/python3, which the package runs on")
    version = run(str(SYSTEM), "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    if f"cp{version.replace('.', '')}-" not in (ROOT / "packaging/agent.lock").read_text():
        pytest.skip(f"the system's Python is {version}: no package is made for it")
    return version


def build(out: Path, epoch: str = EPOCH) -> Path:
    run(
        *BUILD,
        "sordino-agent",
        "--arch",
        ARCH,
        "--python",
        system_python(),
        "--fast",
        "--out",
        str(out),
        SOURCE_DATE_EPOCH=epoch,
    )
    (package,) = out.glob("*.deb")
    return package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("dpkg-deb", "systemd-sysusers", "deb-systemd-helper"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: packages are built and tried on Debian or Ubuntu")
    return build(tmp_path_factory.mktemp("deb"))


def test_the_package_runs_from_where_it_is_unpacked(package: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run("dpkg-deb", "-x", str(package), str(tree))
    home = tree / "opt/sordino-agent"
    agent = (str(home / "bin/python3"), "-I", str(home / "bin/sordino-agent"))
    assert run(*agent, "--version").stdout.startswith("sordino-agent 0.1.0")
    where = run(str(home / "bin/python3"), "-I", "-c", "import numpy, sordino_agent; print(numpy.__file__)").stdout
    assert where.startswith(str(home))
    assert "No module named 'pytest'" in run(str(home / "bin/python3"), "-I", "-c", "import pytest", ok=False).stderr
    enrolled = make_home(tmp_path)
    checked = run(*agent, "check", str(enrolled.folder), "--offline", "--json", ok=False)
    findings = {one["what"]: one["level"] for one in json.loads(checked.stdout)}
    assert findings["key"] == findings["datasets"] == "ok"
    share = tree / "usr/share"
    assert b".TH" in gzip.decompress((share / "man/man1/sordino-agent.1.gz").read_bytes())
    assert "_sordino_agent()" in (share / "bash-completion/completions/sordino-agent").read_text()
    assert not list(tree.rglob("sordino_server")) and not list(tree.rglob("pip"))
    assert (tree / "usr/lib/systemd/system/sordino-agent.service").is_file()


def test_dpkg_finds_nothing_wrong_with_it(package: Path, tmp_path: Path) -> None:
    fields = run("dpkg-deb", "-f", str(package)).stdout
    assert f"Architecture: {ARCH}\n" in fields
    assert f"Depends: python3 (>= {system_python()}), python3 (<< 3." in fields and "libc6 (>= 2." in fields
    run("dpkg-deb", "-x", str(package), str(tmp_path / "tree"))
    run("dpkg-deb", "-e", str(package), str(tmp_path / "control"))
    for line in (tmp_path / "control/md5sums").read_text().splitlines():
        digest, _, name = line.partition("  ")
        data = (tmp_path / "tree" / name).read_bytes()
        assert hashlib.md5(data, usedforsecurity=False).hexdigest() == digest, name
    for script in ("postinst", "prerm", "postrm"):
        run("sh", "-n", str(tmp_path / "control" / script))
    for name in (tmp_path / "tree").rglob("*"):
        assert name.is_symlink() or name.stat().st_mode & 0o022 == 0, name


@pytest.mark.slow
def test_two_builds_give_the_same_bits(package: Path, tmp_path: Path) -> None:
    assert build(tmp_path).read_bytes() == package.read_bytes()


class Root:
    """A folder that dpkg takes for the whole system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "etc", "usr/bin", "var/lib", "tmp", "proc"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "var/lib/dpkg/status").touch()
        (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (folder / "etc/group").write_text("root:x:0:\n")

    def dpkg(self, *arguments: str) -> str:
        force = ("--force-script-chrootless", "--force-depends", "--force-confold", "--force-unsafe-io")
        done = run(
            "dpkg", f"--root={self.folder}", *force, *arguments,
            PATH=f"{os.environ['PATH']}:/usr/sbin:/sbin", DEBIAN_FRONTEND="noninteractive",
        )  # fmt: skip
        return done.stdout + done.stderr

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def listing(self) -> set[str]:
        names = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {name for name in names if "sordino" in name and not name.startswith("var/lib/dpkg")}


@pytest.mark.slow
def test_install_upgrade_remove_purge(package: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("dpkg unpacks with owners, which takes root")
    root = Root(tmp_path / "root")
    home = root / "opt/sordino-agent"
    root.dpkg("-i", str(package))
    assert "sordino-agent:x:" in (root / "etc/passwd").read_text()
    assert (root / "var/lib/sordino-agent").stat().st_mode & 0o777 == 0o700
    assert (root / "etc/systemd/system/multi-user.target.wants/sordino-agent.service").is_symlink()  # enabled
    compiled = home / f"lib/python{system_python()}/site-packages/sordino_agent/__pycache__"
    assert list(compiled.glob("*.pyc"))

    # What makes a device its own survives an upgrade, a removal, and goes with a purge.
    (root / "etc/sordino/agent.env").write_text("# edited\n")
    (root / "etc/sordino/agent.yaml").write_text("agent: {}\n")
    state = root / "var/lib/sordino-agent"
    made = ("agent.key", "boot", "lock", "roster.cbor", "status.json", "ledger.sqlite", "ledger.mark")
    made += ("journal.sqlite-wal", "journal.mark", "sums.mark")
    for name in made:
        (state / name).write_text("x")
    (state / "rows.csv").write_text("the owner's")
    (compiled.parent / "of_a_newer_python.py").write_text("def f[T: ]:")  # as wheels have them: torch's tests did
    said = root.dpkg("-i", str(package))
    assert "of_a_newer_python.py" in said and "sordino-agent: not compiled: the files that are named above" in said
    assert (root / "etc/sordino/agent.env").read_text() == "# edited\n"
    assert all((state / name).exists() for name in made)
    (compiled.parent / "of_a_newer_python.py").unlink()
    root.dpkg("-r", "sordino-agent")
    assert not home.exists()  # and nothing that was compiled is left
    assert (root / "etc/sordino/agent.yaml").exists() and (state / "agent.key").exists()
    root.dpkg("-P", "sordino-agent")
    assert {name for name in root.listing() if not name.endswith(("passwd-", "group-"))} == {
        "var/lib/sordino-agent",
        "var/lib/sordino-agent/rows.csv",
    }


def test_purge_names_all_that_an_agent_makes() -> None:
    """A state file that is added to the agent has to be added to the purge, or deliberately not."""
    from sordino_agent import config, enrol, enrolling, errand, occupied

    text = (ROOT / "packaging/sordino-agent/postrm.purge").read_text()
    constants = [pair for module in (config, enrol, enrolling, errand, occupied) for pair in vars(module).items()]
    names = [value for key, value in constants if key.endswith("_FILE") and isinstance(value, str)]
    names += [f"{purpose}.request" for purpose in get_args(errand.Purpose)]
    names += re.findall(r"(\w+)\.sqlite", text)  # each has a mark beside it, and one without its database is refused
    names = [name if "." in name or name in ("boot", "lock") else f"{name}.mark" for name in names]
    assert len(set(names)) >= 19
    assert [name for name in names if f" {name}" not in text] == []
    assert f'"$state/{config.MODELS_FOLDER}"' in text

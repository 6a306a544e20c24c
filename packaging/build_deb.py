"""Builds Debian packages without debhelper, for any architecture on any: nothing in them is compiled or run here.

    python packaging/build_deb.py sordino-agent --arch arm64 [--out out] [--python 3.11 ...] [--fast]

A package is a virtual environment under /opt that was laid out, not made: pyvenv.cfg, bin/python3 as a link to the
system's Python, and for each version of Python that it may meet a site-packages folder of unpacked wheels. So it needs
neither pip nor the network nor a compiler where it is installed, dpkg knows every file of it, and it goes on working
when the system's Python is upgraded. Files that are the same for several Pythons are in it once (hard links).

The wheels are those of packaging/*.lock, fetched by pip with their hashes, kept in .cache/wheels. Two builds of one
commit give the same bits: order, owners and times are fixed (SOURCE_DATE_EPOCH, or the time of the commit).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))
from lock import PYTHONS, pip_target

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent
ELF_MACHINES: Final = {"arm64": 0xB7, "amd64": 0x3E}  # e_machine, ELF-64 object file format
REVISION: Final = "1"
MACHINES: Final = {"arm64": "aarch64", "amd64": "x86_64"}  # Debian's names, Python's names
# Parts of wheels that nothing on a device runs: test suites, headers, what a type checker or a linker reads.
# The last one: torch's tests of newer Pythons' syntax, which an older Python can't compile.
_LEFT_OUT: Final = re.compile(
    r"(^|/)(tests|include)/|\.(pyi|a|h|pxd|pyx|c)$|^[^/]*\.dist-info/(RECORD|INSTALLER|sboms/)"
    r"|^torch/testing/_internal/py3\d+_[^/]*\.py$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """`modules`: of our own wheel. `programs`: console scripts, by the function that each calls. `units`: of systemd.
    `pages`: manual pages."""

    name: str
    lock: str
    description: str
    modules: tuple[str, ...]
    programs: dict[str, str]
    units: tuple[str, ...]
    pythons: tuple[str, ...]
    pages: tuple[str, ...]
    packing: tuple[str, ...] = ("-Zxz", "-z6")
    depends: tuple[str, ...] = ()
    suggests: tuple[str, ...] = ()
    conffiles: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        return f"opt/{self.name}"


THIS_PYTHON: Final = "{}.{}".format(*sys.version_info[:2])
PACKAGES: Final = {
    "sordino-agent": Package(
        name="sordino-agent",
        lock="agent.lock",
        description="trains on this device's data, which stays here\n"
        " The agent of a Sordino fleet: it keeps the data, checks every command against\n"
        " its owner's policy, and trains, sums or computes on secret shares.\n"
        " .\n"
        " It starts once `sordino-agent init` has made its configuration.",
        modules=("sordino_common", "sordino_agent"),
        programs={"sordino-agent": "sordino_agent.__main__:main"},
        units=("sordino-agent.service",),
        pythons=PYTHONS,
        pages=("sordino-agent.1", "agent.yaml.5"),
        conffiles=("etc/sordino/agent.env",),
    ),
    "sordino-server": Package(
        name="sordino-server",
        lock="server.lock",
        description="one model out of a fleet's data, which stays on the devices\n"
        " The server of a Sordino fleet, its dealer and its simulator: traces a PyTorch\n"
        " training step, orchestrates rounds, keeps runs and checkpoints.",
        modules=("sordino_common", "sordino_agent", "sordino_server", "sordino_sim"),
        programs={
            "sordino": "sordino_server.launch:sordino",
            "sordino-sim": "sordino_sim.launch:sordino_sim",
        },
        units=(
            "sordino-server.service",
            "sordino-dealer.service",
            "sordino-web.service",
            "sordino-renew.service",
            "sordino-renew.timer",
        ),
        pythons=(THIS_PYTHON,),
        pages=("sordino.1", "sordino-sim.1"),
        packing=("-Zzstd", "-z9"),  # torch: minutes less than xz, and every dpkg since Debian 12's reads it
        suggests=("mosquitto",),
        conffiles=("etc/sordino/server.env", "etc/sordino/web.env"),
    ),
}


def build(package: Package, *, arch: str, out: Path, pythons: tuple[str, ...], epoch: int, fast: bool) -> Path:
    """The package's file in `out`. `epoch`: seconds since 1970, the time of everything in it."""
    version = f"{project_version()}-{REVISION}"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ours = project_wheel(Path(scratch), epoch)
        wheels = {python: fetch(package.lock, python, arch) for python in pythons}
        for python in pythons:
            site = tree / package.home / "lib" / f"python{python}" / "site-packages"
            for wheel in wheels[python]:
                unpack(wheel, site)
            unpack(ours, site, only=(*package.modules, f"sordino-{project_version()}.dist-info"))
        require_machine(tree / package.home / "lib", arch)
        lay_out(package, tree)
        link_equal_files(tree / package.home / "lib")
        glibc = max((glibc_minor(wheel.name) for found in wheels.values() for wheel in found), default=17)
        control(package, tree, version=version, arch=arch, pythons=pythons, glibc=glibc)
        settle(tree, epoch)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{package.name}_{version}_{arch}.deb"
        packing = ["-Zgzip", "-z1"] if fast else package.packing
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", *packing, "--build", str(tree), str(path)],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)},
        )  # fmt: skip
    return path


# --- what goes in -------------------------------------------------------------------------------------------------


def project_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return version


def project_wheel(scratch: Path, epoch: int) -> Path:
    """Our own wheel, built by the pinned hatchling."""
    folder = scratch / "wheel"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    run_pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT), environment=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def fetch(lock: str, python: str, arch: str) -> list[Path]:
    """The wheels of `lock` for this Python and architecture, from the cache or by pip, hashes compared either way."""
    digests = dict(re.findall(r"(?m)^# sha256:([0-9a-f]{64})  (\S+\.whl)$", (HERE / lock).read_text("utf-8")))
    folder = ROOT / ".cache" / "wheels" / f"{lock}-{python}-{arch}"
    projects = len(re.findall(r"(?m)^\S+==\S+ \\$", (HERE / lock).read_text("utf-8")))

    def sound() -> list[Path] | None:
        found = sorted(folder.glob("*.whl"))
        good = all(digests.get(hashlib.sha256(wheel.read_bytes()).hexdigest()) == wheel.name for wheel in found)
        return found if good and len(found) == projects else None

    found = sound()
    if found is None:
        shutil.rmtree(folder, ignore_errors=True)
        target = pip_target(python, MACHINES[arch])
        run_pip("download", "--no-deps", "--require-hashes", "--dest", str(folder), *target, "-r", str(HERE / lock))
        found = sound()
    if found is None:
        raise SystemExit(f"{folder}: these are not the wheels of {lock}; make it again: python packaging/lock.py")
    return found


def run_pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pip {arguments[0]}: {done.stderr.strip()}")


def unpack(wheel: Path, site: Path, *, only: tuple[str, ...] = ()) -> None:
    """The files of a wheel into `site`; with `only`, of these top folders. Scripts are not taken: ours are laid out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = PurePosixPath(name).parts
            if name.endswith("/") or (only and parts[0] not in only):
                continue
            if parts[0].endswith(".data"):
                if parts[1] in ("scripts", "data", "headers"):
                    continue
                parts = parts[2:]
            if ".." in parts or name.startswith("/"):
                raise SystemExit(f"{wheel.name}: {name!r} leads out of the folder")
            if _LEFT_OUT.search("/".join(parts)):
                continue
            path = site.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def require_machine(folder: Path, arch: str) -> None:
    """Every program code in `folder` is for this architecture. A wheel that lies about itself ends the build."""
    for path in files(folder):
        with path.open("rb") as file:
            head = file.read(20)
        if head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") != ELF_MACHINES[arch]:
            raise SystemExit(f"{path.relative_to(folder)}: not for {arch}")


def lay_out(package: Package, tree: Path) -> None:
    """The environment's skeleton, units, users, manual pages, and what dpkg wants to see."""
    home = tree / package.home
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python3").symlink_to("/usr/bin/python3")
    (home / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n", "ascii")
    (tree / "usr/bin").mkdir(parents=True)
    for program, function in package.programs.items():
        module, _, name = function.partition(":")
        script = home / "bin" / program
        script.write_text(
            f"#!/{package.home}/bin/python3 -I\nimport sys\n\nfrom {module} import {name}\n\nsys.exit({name}())\n"
        )
        script.chmod(0o755)
        (tree / "usr/bin" / program).symlink_to(f"/{package.home}/bin/{program}")
    for unit in package.units:
        copy(ROOT / "systemd" / unit, tree / f"usr/lib/systemd/system/{unit}")
    for kind in ("sysusers.d", "tmpfiles.d"):
        copy(ROOT / "systemd" / kind / f"{package.name}.conf", tree / f"usr/lib/{kind}/{package.name}.conf")
    for name in package.conffiles:
        copy(HERE / package.name / Path(name).name, tree / name)
    share = tree / f"usr/share/{package.name}"
    copy(ROOT / "systemd/drop-ins/backoff.conf", share / "backoff.conf")
    documents = tree / f"usr/share/doc/{package.name}"
    for drop_in in sorted((ROOT / "systemd/drop-ins").glob("*.conf")):
        copy(drop_in, documents / "examples" / drop_in.name)
    copy(ROOT / "docs/install.md", documents / "install.md")
    copyright_of(package, tree, documents / "copyright")
    squeeze((ROOT / "CHANGELOG.md").read_bytes(), documents / "changelog.gz")
    manual(package, tree)


def manual(package: Package, tree: Path) -> None:
    """Manual pages and completions, which the programs write about themselves."""
    with tempfile.TemporaryDirectory() as scratch:
        run_own(str(ROOT / "scripts/make-man"), scratch)
        for name in package.pages:
            page = Path(scratch) / name
            squeeze(page.read_bytes(), tree / f"usr/share/man/man{page.suffix[1:]}/{name}.gz")
    places = {
        "bash": "bash-completion/completions/{}",
        "zsh": "zsh/vendor-completions/_{}",
        "fish": "fish/vendor_completions.d/{}.fish",
    }
    for program, function in package.programs.items():
        module, _, name = function.partition(":")
        for shell, place in places.items():
            code = f"import sys; from {module} import {name}; sys.argv = [{program!r}, 'completion', {shell!r}]"
            script = tree / "usr/share" / place.format(program)
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(run_own("-c", f"{code}; sys.exit({name}())"))


def run_own(*arguments: str) -> str:
    """What this tree's own programs print."""
    path = os.pathsep.join(str(ROOT / name) for name in ("common", "agent", "server", "firmware_sim"))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode != 0:
        raise SystemExit(f"{arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def copyright_of(package: Package, tree: Path, path: Path) -> None:
    """Ours, and where each wheel's licence lies in the package: none of them is taken out."""
    licences = sorted({
        str(file.relative_to(tree))
        for file in (tree / package.home / "lib").rglob("*")
        if re.search(r"(?i)^(licen[cs]e|copying|notice)", file.name) and ".dist-info" in str(file)
    })  # fmt: skip
    path.write_text(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: sordino\n\n"
        "Files: *\nCopyright: the Sordino authors\nLicense: Apache-2.0\n"
        " On Debian systems, the full text of the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0.\n\n"
        f"Files: /{package.home}/lib/*\nCopyright: their authors, as named in the files below\nLicense: as in these\n"
        " The packages in this environment come with their licences:\n" + "".join(f" /{name}\n" for name in licences)
    )


def control(package: Package, tree: Path, *, version: str, arch: str, pythons: tuple[str, ...], glibc: int) -> None:
    """DEBIAN/: the control file, the maintainer's scripts, configuration files, triggers, checksums."""
    debian = tree / "DEBIAN"
    debian.mkdir()
    after = f"{pythons[-1].split('.')[0]}.{int(pythons[-1].split('.')[1]) + 1}"
    depends = (
        f"python3 (>= {pythons[0]}), python3 (<< {after}~), libc6 (>= 2.{glibc}), systemd (>= 252)",
        *package.depends,
    )
    size = sum(inode_sizes(tree))
    fields = {
        "Package": package.name,
        "Version": version,
        "Architecture": arch,
        "Maintainer": "Sordino maintainers <maintainers@sordino.invalid>",
        "Installed-Size": str(-(-size // 1024)),
        "Depends": ", ".join(depends),
        "Suggests": ", ".join(package.suggests),
        "Section": "science",
        "Priority": "optional",
        "Description": package.description,
    }
    text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
    (debian / "control").write_text(text, "utf-8")
    (debian / "conffiles").write_text("".join(f"/{name}\n" for name in package.conffiles))
    (debian / "triggers").write_text("interest-noawait /usr/bin/python3\ninterest-noawait /usr/lib/systemd/systemd\n")
    for script in ("postinst", "prerm", "postrm"):
        body = (HERE / script).read_text("utf-8")
        body = body.replace("@PACKAGE@", package.name).replace("@UNITS@", " ".join(package.units))
        local = HERE / package.name / f"{script}.purge"
        body = body.replace("@PURGE@", local.read_text("utf-8") if local.exists() else "")
        (debian / script).write_text(body, "utf-8")
        (debian / script).chmod(0o755)
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}\n"
        for path in files(tree)
        if not path.is_relative_to(debian) and str(path.relative_to(tree)) not in package.conffiles
    )
    (debian / "md5sums").write_text("".join(sums))


# --- always the same bits ------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """Regular files, in order; no links."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def inode_sizes(folder: Path) -> Iterator[int]:
    seen: set[int] = set()
    for path in files(folder):
        found = path.stat()
        if found.st_ino not in seen:
            seen.add(found.st_ino)
            yield found.st_size


def link_equal_files(folder: Path) -> None:
    """Files with the same content become one file with several names."""
    first: dict[tuple[int, bytes], Path] = {}
    for path in files(folder):
        data = path.read_bytes()
        if not data:
            continue
        before = first.setdefault((len(data), hashlib.sha256(data).digest()), path)
        if before is not path:
            path.unlink()
            os.link(before, path)


def settle(tree: Path, epoch: int) -> None:
    """Modes and times that don't tell where and when this was built."""
    paths: Iterable[Path] = sorted(tree.rglob("*"), reverse=True)
    for path in (*paths, tree):
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def squeeze(data: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(data, 9, mtime=0))


def glibc_minor(wheel: str) -> int:
    """Of the oldest C library 2.x that a wheel's name promises to work with; 17 for one that does not care."""
    minors = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel)]
    return min(minors, default=17)


def source_date() -> int:
    """SOURCE_DATE_EPOCH, or the time of the commit that is built."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        shown = subprocess.run(
            ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
        )
        given = shown.stdout.strip()
    if not given.isdigit():
        raise SystemExit("this is no git checkout: set SOURCE_DATE_EPOCH to the release's time, in seconds since 1970")
    return int(given)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a Debian package.")
    parser.add_argument("package", choices=sorted(PACKAGES))
    parser.add_argument("--arch", choices=sorted(MACHINES), required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--python", action="append", metavar="X.Y", help="only for these versions of Python")
    parser.add_argument("--fast", action="store_true", help="hardly packed; for tests")
    arguments = parser.parse_args()
    if shutil.which("dpkg-deb") is None:
        raise SystemExit("dpkg-deb is not here: build on Debian or Ubuntu, or install the package `dpkg`")
    package = PACKAGES[arguments.package]
    path = build(
        package,
        arch=arguments.arch,
        out=arguments.out,
        pythons=tuple(arguments.python or package.pythons),
        epoch=source_date(),
        fast=arguments.fast,
    )
    sys.stdout.write(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()

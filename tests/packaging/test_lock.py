"""The agent's lock file: what `pip install sordino` brings, few, pinned, hashed, and with wheels for 64-bit ARM."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parent.parent.parent
LOCK = ROOT / "packaging" / "agent.lock"
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
FEW = 10


def entries(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """{project: (version, {file: SHA-256})}; the comments' hashes have to be those that pip reads."""
    found = {}
    for block in text.split("\n\n")[1:]:
        named = dict(re.findall(r"(?m)^# sha256:([0-9a-f]{64})  (\S+)$", block))
        project, version = re.findall(r"(?m)^(\S+)==(\S+) \\$", block)[0]
        hashes = re.findall(r"(?m)^ {4}--hash=sha256:([0-9a-f]{64})(?: \\)?$", block)
        assert sorted(hashes) == sorted(named), project
        found[project] = (version, {file: sha256 for sha256, file in named.items()})
    return found


def tags(python: tuple[int, int], architecture: str) -> set[Tag]:
    """What that Python takes on Debian 12 (glibc 2.36)."""
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in range(36, 16, -1)] + [
        f"manylinux2014_{architecture}"
    ]
    return {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}


def closure() -> Iterator[str]:
    """The agent's requirements, and theirs, as the installed distributions tell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, seen = list(project["dependencies"]), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        yield name
        waiting += metadata.requires(name) or []


@pytest.mark.parametrize("architecture", ["aarch64", "x86_64"])
def test_every_dependency_has_a_wheel(architecture: str) -> None:
    locked = entries(LOCK.read_text())
    for python in PYTHONS:
        taken = tags(python, architecture)
        for project, (version, files) in locked.items():
            fitting = [file for file in files if parse_wheel_filename(file)[3] & taken]
            assert len(fitting) == 1, f"{project} {version}: {fitting} for Python {python} on {architecture}"
            name, of_file, _, _ = parse_wheel_filename(fitting[0])
            assert (name, str(of_file)) == (project, version)


def test_the_lock_is_complete_and_pinned_like_the_tests() -> None:
    locked = entries(LOCK.read_text())
    assert set(locked) == set(closure())
    assert len(locked) <= FEW
    constraints = (ROOT / "constraints.txt").read_text()
    pins = {canonicalize_name(name): version for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)$", constraints)}
    assert {project: version for project, (version, _) in locked.items()} == {name: pins[name] for name in locked}


def test_a_dependency_without_a_wheel_would_be_noticed() -> None:
    """This test can fail: a wheel for one architecture only, and a hash that pip would not see."""
    text = LOCK.read_text()
    assert not any(parse_wheel_filename("numpy-2.4.6-cp311-cp311-macosx_14_0_arm64.whl")[3] & tags((3, 11), "aarch64"))
    with pytest.raises(AssertionError, match="numpy"):
        entries(re.sub(r"(?m)^# sha256:.*numpy.*cp311.*aarch64.*\n", "", text))

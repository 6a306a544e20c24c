"""Configuration errors are part of the interface: they name file, line and column, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from sordino_common.config import error_at, load_config, load_config_with_marks, parse_config
from sordino_common.errors import ConfigError


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rounds: Annotated[int, msgspec.Meta(ge=1)]
    rate: float = 0.1
    names: tuple[str, ...] = ()


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    train: Train
    note: str | None = None


class Sgd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="sgd"):
    rate: float = 0.1


class Adam(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="name", tag="adam"):
    rate: float = 0.1


class Parts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    optimizer: Sgd | Adam = Sgd()
    unit: Literal["record", "device"] | None = None
    degrees: tuple[Annotated[Literal[3, 5], msgspec.Meta(description="odd")], ...] = ()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("optimizer: {name: lion}", "job.yaml:1:13: optimizer.name: Invalid value 'lion'; expected one of sgd, adam"),
        ("optimizer: {name: adam, rat: 1}", (
            "job.yaml:1:25: optimizer.rat: Object contains unknown field `rat`; did you mean `rate`?"
        )),
        ("unit: row", "job.yaml:1:1: unit: Invalid enum value 'row'; expected one of device, record"),
        ("degrees: [3, 4]", "job.yaml:1:14: degrees[1]: Invalid enum value 4; expected one of 3, 5"),
        ("zzz: 1", "job.yaml:1:1: zzz: Object contains unknown field `zzz`"),
    ],
)  # fmt: skip
def test_what_could_stand_there_instead_is_said(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(text, Parts, where="job.yaml")
    assert str(refused.value) == error


GOOD = "train:\n  rounds: 3\n  rate: 1e-3\n  names: [yes, 012x]\nnote: ~\n"


def test_a_good_file() -> None:
    assert parse_config(GOOD, Job, where="job.yaml") == Job(train=Train(rounds=3, rate=0.001, names=("yes", "012x")))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("train:\n  rounds: 0\n", r"^job.yaml:2:3: train.rounds: Expected `int` >= 1$"),
        ("train:\n  rounds: 1\n  foo: 3\n", r"^job.yaml:3:3: train.foo: .*unknown field `foo`$"),
        ("train:\n  rounds: 1\n  names: [a, 3]\n", r"^job.yaml:3:14: train.names\[1\]: Expected `str`, got `int`$"),
        ("train: 3\n", r"^job.yaml:1:1: train: Expected `object`, got `int`$"),
        ("train:\n  rounds: 1\n  rounds: 2\n", r"^job.yaml:3:3: `rounds` is given twice$"),
        ("train: {rounds: 1\n", r"^job.yaml:2:1: expected ',' or '}'"),
        ("- 1\n", r"^job.yaml:1:1: expected a mapping of keys to values, got list$"),
        ("", r"^job.yaml:1:1: .*missing required field `train`$"),
        ("a: &x 1\nb: *x\n", r"^job.yaml:2:4: aliases"),
        ("train: !!python/object:os.system {}\n", r"^job.yaml:1:8: the YAML tag .* is not taken|^job.yaml"),
        ("note: !!binary aGk=\n", r"^job.yaml:1:7: the YAML tag tag:yaml.org,2002:binary is not taken"),
        ("? [a]\n: 1\n", r"^job.yaml:1:3: a key must be plain text$"),
        ("a: 1\n---\nb: 2\n", r"^job.yaml:2:1: "),
        ("a: " + "[" * 40 + "]" * 40 + "\n", "nested deeper than 32"),
        ("\ta: 1\n", r"^job.yaml:1:1: "),
    ],
)
def test_errors_say_where(text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_config(text, Job, where="job.yaml")


def test_overrides() -> None:
    job = parse_config(GOOD, Job, where="job.yaml", overrides=["train.rounds=7", "train.names=[a, b]", "note=hi"])
    assert job == Job(train=Train(rounds=7, rate=0.001, names=("a", "b")), note="hi")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("train.rounds=many", r"^--set train.rounds: train.rounds: Expected `int`, got `str`$"),
        ("train.turns=3", r"^--set train.turns: train.turns: .*unknown field"),
        ("train.rounds", r"^--set train.rounds: expected key.path=value$"),
        ("=3", r"expected key.path=value$"),
        ("train..rounds=3", r"expected key.path=value$"),
        ("note.x=3", r"`note` is not a mapping$|Expected"),
        ("train.names=[a", r"^--set train.names: the value is not valid YAML"),
    ],
)
def test_bad_overrides_name_themselves(override: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_config(GOOD, Job, where="job.yaml", overrides=[override])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(ConfigError, match=r"job.yaml: can't be read: No such file"):
        load_config(path, Job)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        load_config(path, Job)
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="Is this the file"):
        load_config(path, Job)
    path.write_text(GOOD, "utf-8")
    job, marks = load_config_with_marks(path, Job)
    assert job == load_config(path, Job)
    assert str(error_at(str(path), marks, ("train", "names", 1), "no such column")).endswith(
        "job.yaml:4:16: no such column"
    )
    assert ":4:3: " in str(error_at(str(path), marks, ("train", "names", 9), "text"))

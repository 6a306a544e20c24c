"""A bare install is the agent: the other two commands say what to install."""

from __future__ import annotations

import os
import sys

import pytest

from sordino_server import launch
from sordino_sim.launch import sordino_sim

PROGRAMS = {"sordino": launch.sordino, "sordino-sim": sordino_sim}


@pytest.mark.parametrize(("program", "extra"), [("sordino", "server"), ("sordino-sim", "sim")])
def test_missing_packages_end_with_the_remedy(
    program: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name in ("torch", "typer") else object())
    with pytest.raises(SystemExit) as end:
        PROGRAMS[program]()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"{program}: torch, typer not installed, only sordino-agent runs here; do: pip install 'sordino[{extra}]'\n"
    )


@pytest.mark.parametrize("program", ["sordino", "sordino-sim"])
def test_with_the_packages_the_command_runs(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        PROGRAMS[program]()
    assert end.value.code == 0
    assert f"Usage: {program}" in capsys.readouterr().out


@pytest.mark.parametrize("said", [None, "3"])
def test_openblas_has_one_thread_unless_the_environment_says_otherwise(
    said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sordino", "--help"])
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", said or "")
    if said is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    with pytest.raises(SystemExit):
        launch.sordino()
    assert os.environ["OPENBLAS_NUM_THREADS"] == (said or "1")
    capsys.readouterr()

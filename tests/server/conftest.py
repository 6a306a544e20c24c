"""Offices for the tests of enrolment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from helpers_enrol import make_fleet
from helpers_office import Office
from sordino_server.enrolment.broker_config import BrokerPlace
from sordino_server.enrolment.store import EnrolmentStore


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_fleet(folder)
    EnrolmentStore(folder / "fleet").close()
    return folder


@pytest.fixture
def office(tmp_path: Path, template: Path) -> Iterator[Office]:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    place = BrokerPlace(folder=str(tmp_path / "broker"), enrol_port=8884)
    (tmp_path / "fleet" / "ca" / "broker.json").write_bytes(msgspec.json.encode(place))
    made = Office(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """For tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    make_fleet(folder)
    made = Office(folder)
    yield made
    made.store.close()

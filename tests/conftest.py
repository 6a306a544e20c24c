"""What every test may ask for: a real broker, a real database; skipped with a reason where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers_mosquitto import Mosquitto, require_mosquitto
from helpers_postgres import Postgres, require_postgres


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("mqtt") is not None:
        require_mosquitto()


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """`start_mosquitto(*config_lines, anonymous=True)`: a running broker, stopped after the test."""
    require_mosquitto()
    running: list[Mosquitto] = []

    def start(*lines: str, anonymous: bool = True) -> Mosquitto:
        broker = Mosquitto(tmp_path / f"mosquitto-{len(running)}", *lines, anonymous=anonymous)
        running.append(broker)
        broker.start()
        return broker

    yield start
    for broker in running:
        broker.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL cluster of this session's own; `postgres.url()` is a new database."""
    cluster = Postgres(require_postgres())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()

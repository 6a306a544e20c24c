"""Our own mosquitto: starts, restarts on its port, and says what is wrong when it can't."""

import socket
from pathlib import Path

import pytest

from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_sim import broker as broker_module
from sordino_sim.broker import LocalBroker, free_port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.mqtt
def test_it_starts_restarts_on_its_port_and_stops(tmp_path: Path) -> None:
    with LocalBroker(tmp_path) as broker:
        port, pid = broker.port, broker.pid
        assert listens(port) and pid is not None
        broker.start()  # a second start changes nothing
        assert broker.pid == pid
        broker.restart()
        assert broker.port == port and broker.pid != pid and listens(port)
    assert not listens(port) and broker.pid is None
    broker.stop()  # and neither does a second stop


@pytest.mark.mqtt
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FleetUnavailable, match=f"127.0.0.1:{port}.*in use"):
            LocalBroker(tmp_path, port=port).start()


@pytest.mark.mqtt
def test_a_broker_that_dies_at_once_gives_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "broker_config", lambda port, max_packet_bytes: "nonsense yes\n")
    with pytest.raises(FleetUnavailable, match="nonsense"):
        LocalBroker(tmp_path).start()


def test_no_mosquitto_is_a_configuration_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(broker_module, "_PLACES", ())
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        LocalBroker(tmp_path)


def test_a_free_port_is_free() -> None:
    assert not listens(free_port())

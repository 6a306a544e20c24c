"""Every transport obeys the laws of `helpers_transport`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers_mosquitto import Mosquitto
from helpers_transport import LAWS, MemoryHarness, mqtt_harness


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("network", ["at once", "50 ms", "50 ms, doubled"])
def test_memory(law: str, network: str) -> None:
    if network == "at once" and law == "lets_a_slow_subscriber_be_slow":
        network = "slow only"
    LAWS[law](MemoryHarness(latency_s=0.0 if network == "at once" else 0.05, doubled="doubled" in network))


@pytest.mark.mqtt
@pytest.mark.parametrize("law", LAWS)
def test_mqtt(law: str, start_mosquitto: Callable[..., Mosquitto]) -> None:
    with mqtt_harness(start_mosquitto()) as harness:
        LAWS[law](harness)

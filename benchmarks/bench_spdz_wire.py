"""SPDZ over a real broker with real agent processes, beside its floor, all in one run.

    floor    rounds x (time of a raw broadcast round trip: two processes, MQTT v5 through mosquitto on loopback,
             payloads as large as a round's shares, no keys, no links) + what the party's arithmetic takes
    actual   `sordino-agent` processes with their workers, active and passive, the server dealing beside them

The two are interleaved, since a busy machine slows both; read the ratio, not the milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sordino_common.transport.mqtt import MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor
from sordino_server.job import load_job
from sordino_sim.broker import LocalBroker
from sordino_sim.runner import simulate

EXAMPLE = Path(__file__).parents[1] / "examples" / "boston-spdz.yaml"
TURNS = 200


class _Pinger:
    """Publishes to the other and waits for the other's, again and again: a round without anything in it."""

    def __init__(self, port: int, index: int, nbytes: int, turns: int) -> None:
        self.reactor = Reactor()
        self.payload = bytes(nbytes)
        self.index, self.turns = index, turns
        self.done = self.heard = 0
        self.times: list[float] = []
        settings = MqttSettings(host="127.0.0.1", port=port, client_id=f"ping-{index}")
        self.transport = MqttTransport(settings, self.reactor)
        self.transport.subscribe(f"ping/{1 - index}")
        self.transport.open(self)

    def on_connected(self) -> None:
        self.reactor.call_at(self.reactor.now_s() + 1.0, self._send)  # the other is there by then

    def on_disconnected(self, reason: str) -> None: ...

    def on_writable(self) -> None: ...

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        self.heard += 1
        self._next()

    def _send(self) -> None:
        self.times.append(time.perf_counter())
        self.transport.publish(f"ping/{self.index}", self.payload)
        self.done += 1
        self._next()

    def _next(self) -> None:
        while self.heard >= self.done and 0 < self.done < self.turns:
            self._send()

    def run(self) -> float:
        """Median seconds of a round trip."""
        end_s = self.reactor.now_s() + 60.0
        self.reactor.run_until(lambda: self.heard >= self.turns and self.done >= self.turns, deadline_s=end_s)
        return statistics.median(b - a for a, b in zip(self.times[20:], self.times[21:], strict=False))


def round_trip_s(nbytes: int) -> float:
    """A raw broadcast round trip between two processes."""
    with tempfile.TemporaryDirectory() as folder, LocalBroker(Path(folder)) as broker:
        arguments = [sys.executable, __file__, "--ping", str(broker.port), str(nbytes)]
        other = subprocess.Popen([*arguments, "1"], stdout=subprocess.DEVNULL)
        try:
            return float(subprocess.run([*arguments, "0"], capture_output=True, check=True, text=True).stdout)
        finally:
            other.wait(90)


def run_once(security: str, steps: int, agents: int) -> dict[str, Any]:
    job = load_job(
        EXAMPLE,
        overrides=(
            "train.rounds=1", "train.local_epochs=null", f"train.local_steps={steps}", f"simulation.agents={agents}",
            f"spdz.compute_agents={agents}", f"spdz.security={security}", "spdz.evaluate=clear",
        ),
    )  # fmt: skip
    return dict(simulate(job, transport="processes", with_baseline=False).summary)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping", nargs=3, type=int, metavar=("PORT", "BYTES", "INDEX"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--agents", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.ping is not None:
        port, nbytes, index = arguments.ping
        print(_Pinger(port, index, nbytes, TURNS).run())
        return
    kinds = ("passive", "active")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    arithmetic: dict[str, list[float]] = {kind: [] for kind in kinds}
    trips: list[float] = []
    rounds = 0
    for _ in range(arguments.turns):
        for kind in kinds:
            summary = run_once(kind, arguments.steps, arguments.agents)
            rounds = summary["online_rounds_per_step"]
            trips.append(round_trip_s(summary["opened_bytes_per_step_per_party"] // rounds))
            found[kind].append(summary["online_seconds"] / arguments.steps)
            arithmetic[kind].append(summary["compute_seconds"] / arguments.steps)
    trip = statistics.median(trips)
    print(f"raw broadcast round trip {1e3 * trip:.2f} ms, {rounds} rounds a step")
    steps = {kind: statistics.median(values) for kind, values in found.items()}
    for kind in kinds:
        checks = 4 / 8 if kind == "active" else 0.0  # check_every 8: half a round a step
        floor = (rounds + checks) * trip + statistics.median(arithmetic[kind])
        print(
            f"{kind:8} {1e3 * steps[kind]:6.2f} ms a step, floor {1e3 * floor:.2f} ms: {steps[kind] / floor:.2f} times "
            f"(worker {1e3 * statistics.median(arithmetic[kind]):.2f} ms)"
        )
    print(f"active / passive {steps['active'] / steps['passive']:.2f}")


if __name__ == "__main__":
    main()

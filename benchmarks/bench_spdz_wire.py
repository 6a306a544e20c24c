"""SPDZ over a real broker with real agent processes, beside its floor, all in one run.

    floor    rounds x (time of a raw broadcast round trip: two processes, MQTT v5 through mosquitto on loopback,
             payloads as large as a round's shares, no keys, no links) + what the party's worker takes of the processor
    online   `sordino-agent` processes with their workers, active and passive, whose preprocessing is there
             (spdz.preprocessing: first): what the floor is of
    beside   the same, and the server deals beside them, on the same cores: what a training takes where the dealer has
             no machine of its own

All are interleaved, since a busy machine slows them alike; read the ratio, not the milliseconds. The round trip is told
twice: by quality of service 1, as a program with paho would do it (that is the floor), and by 0, which is what agents
send. `best` is the quickest turn's ratio: least disturbed by whoever else is on the machine.

`--cpu`: what the processes take of the CPU for a step, by the difference of two runs. Robust.
"""

from __future__ import annotations

import argparse
import os
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
from sordino_server.launch import ONE_THREAD
from sordino_server.rounds.spdz import AHEAD_MOST
from sordino_sim.broker import LocalBroker
from sordino_sim.runner import simulate

EXAMPLE = Path(__file__).parents[1] / "examples" / "boston-spdz.yaml"
TURNS = 200
BLOCK = 20


class _Pinger:
    """Publishes to the other and waits for the other's, again and again: a round without anything in it."""

    def __init__(self, port: int, index: int, nbytes: int, turns: int, *, fleeting: bool) -> None:
        self.reactor = Reactor()
        self.fleeting = fleeting
        self.payload = bytes(nbytes)
        self.index, self.turns = index, turns
        self.done = self.heard = 0
        self.times: list[float] = []
        settings = MqttSettings(host="127.0.0.1", port=port, client_id=f"ping-{index}")
        self.transport = MqttTransport(settings, self.reactor)
        self.transport.subscribe(f"ping/{1 - index}")
        self.transport.open(self)

    def on_connected(self) -> None:
        if self.index == 0:
            self._call()

    def _call(self) -> None:
        """Again and again, until the other is there and answers."""
        if not self.times:
            self.transport.publish(f"ping/{self.index}", b"")
            self.reactor.call_at(self.reactor.now_s() + 0.1, self._call)

    def on_disconnected(self, reason: str) -> None: ...

    def on_writable(self) -> None: ...

    def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
        self.heard += bool(payload)
        if self.times:
            self._next()
        elif payload or self.index == 0:
            self._send()
        else:
            self.transport.publish(f"ping/{self.index}", b"")

    def _send(self) -> None:
        self.times.append(time.perf_counter())
        self.transport.publish(f"ping/{self.index}", self.payload, fleeting=self.fleeting)
        self.done += 1
        self._next()

    def _next(self) -> None:
        while self.heard >= self.done and 0 < self.done < self.turns:
            self._send()

    def run(self) -> float:
        """Seconds of a round trip: the median over blocks, because two that got out of step send by twos."""
        end_s = self.reactor.now_s() + 60.0
        done = self.reactor.run_until(lambda: self.heard >= self.turns and self.done >= self.turns, deadline_s=end_s)
        self.transport.close()  # the last packet is still on its way to the other
        self.reactor.close()
        if not done:
            raise SystemExit(f"ping {self.index}: {self.heard} of {self.turns} came within 60 s")
        return statistics.median(b - a for a, b in zip(self.times, self.times[BLOCK:], strict=False)) / BLOCK


def round_trip_s(nbytes: int, *, quality: int) -> float:
    """A raw broadcast round trip between two processes, by quality of service 0 or 1."""
    with tempfile.TemporaryDirectory() as folder, LocalBroker(Path(folder)) as broker:
        arguments = [sys.executable, __file__, "--ping", str(broker.port), str(nbytes), str(quality)]
        other = subprocess.Popen([*arguments, "1"], stdout=subprocess.DEVNULL)
        try:
            return float(subprocess.run([*arguments, "0"], capture_output=True, check=True, text=True).stdout)
        finally:
            other.wait(90)


def run_once(security: str, steps: int, agents: int, *, preprocessing: str = "beside") -> dict[str, Any]:
    job = load_job(
        EXAMPLE,
        overrides=(
            "train.rounds=1", "train.local_epochs=null", f"train.local_steps={steps}", f"simulation.agents={agents}",
            f"spdz.compute_agents={agents}", f"spdz.security={security}", "spdz.evaluate=clear",
            f"spdz.preprocessing={preprocessing}",
        ),
    )  # fmt: skip
    return dict(simulate(job, transport="processes", with_baseline=False).summary)


def cpu_s() -> tuple[float, float]:
    """Seconds of CPU so far: of this process (server and dealer), of all that it has waited for (agents, broker)."""
    times = os.times()
    return times.user + times.system, times.children_user + times.children_system


def print_cpu(kind: str, steps: int, agents: int) -> None:
    """The difference of a long and a short run: starting costs the same in both."""
    taken = []
    for count in (steps // 5, steps // 5, steps):  # the first one warms up
        before = cpu_s()
        run_once(kind, count, agents)
        taken.append([after - earlier for after, earlier in zip(cpu_s(), before, strict=True)])
    server, others = (
        1e3 * (long - short) / (steps - steps // 5) for long, short in zip(taken[2], taken[1], strict=True)
    )
    print(
        f"{kind:8} CPU {server + others:6.2f} ms a step: server and dealer {server:.2f}, agents and broker {others:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping", nargs=4, type=int, metavar=("PORT", "BYTES", "QUALITY", "INDEX"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU for a step, beside")
    arguments = parser.parse_args()
    if arguments.ping is not None:
        port, nbytes, quality, index = arguments.ping
        print(_Pinger(port, index, nbytes, TURNS, fleeting=quality == 0).run())
        return
    kinds = [(kind, when) for when in ("online", "beside") for kind in ("passive", "active")]
    found: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    arithmetic: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    trips: dict[int, list[float]] = {0: [], 1: []}
    rounds = 0
    for _ in range(arguments.turns):
        for security, when in kinds:
            # All that is dealt first is at most so much.
            steps, preprocessing = (AHEAD_MOST, "first") if when == "online" else (arguments.steps, "beside")
            summary = run_once(security, steps, arguments.agents, preprocessing=preprocessing)
            rounds = summary["online_rounds_per_step"]
            for quality, values in trips.items():
                nbytes = summary["opened_bytes_per_step_per_party"] // rounds
                values.append(round_trip_s(nbytes, quality=quality))
            found[security, when].append(summary["online_seconds"] / steps)
            arithmetic[security, when].append(summary["compute_seconds"] / steps)
    for middle, name in ((statistics.median, "median"), (min, "best")):
        trip = {quality: middle(values) for quality, values in trips.items()}
        raw = f"{1e3 * trip[1]:.2f} ms (quality of service 0: {1e3 * trip[0]:.2f} ms)"
        print(f"{name}: raw broadcast round trip {raw}, {rounds} rounds a step")
        taken = {kind: middle(values) for kind, values in found.items()}
        for kind in kinds:
            # The four messages of a check travel with the openings of the next steps: they are no rounds of their own.
            work = middle(arithmetic[kind])
            floor, quick = (rounds * trip[quality] + work for quality in (1, 0))
            print(
                f"  {kind[0]:8}{kind[1]:7}{1e3 * taken[kind]:6.2f} ms a step, floor {1e3 * floor:.2f} ms: "
                f"{taken[kind] / floor:.2f} times (of {1e3 * quick:.2f} ms: {taken[kind] / quick:.2f} times; "
                f"worker {1e3 * work:.2f} ms)"
            )
        for when in ("online", "beside"):
            print(f"  active / passive, {when}: {taken['active', when] / taken['passive', when]:.2f}")
    if arguments.cpu:
        for kind in ("passive", "active"):
            print_cpu(kind, arguments.steps, arguments.agents)


if __name__ == "__main__":
    if not ONE_THREAD.keys() <= os.environ.keys():  # as `sordino` does; NumPy is here already
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ONE_THREAD, **os.environ})
    main()

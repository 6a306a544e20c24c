"""A training step on shares over a broker against its floor, rounds x raw broadcast + arithmetic: see `spdz.py`.

Raw broadcast: two processes that each publish a round to the other and wait for the other's, by paho alone,
QoS 1, through a mosquitto on loopback, nothing around the bytes. Ours: `sordino-sim run --transport processes` with two
compute agents, a process each; a step is the difference between a long and a short run over the difference in steps, so
that starting up counts nowhere.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sordino_sim.broker import LocalBroker

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples" / "boston-spdz.yaml"
SHORT, LONG = 64, 384  # steps
CHECK_EVERY = 32


def raw_seconds(sizes: Sequence[int], *, steps: int = 200) -> float:
    """Seconds of one step's broadcasts: one message of each size, each answered by the other side's."""
    with tempfile.TemporaryDirectory() as scratch, LocalBroker(Path(scratch) / "broker") as broker:
        command = [sys.executable, __file__, str(broker.port), ",".join(map(str, sizes)), str(steps)]
        other = subprocess.Popen([*command, "b"], stdout=subprocess.PIPE)
        mine = subprocess.run([*command, "a"], stdout=subprocess.PIPE, check=True, timeout=120)
        other.wait(timeout=120)
        return float(mine.stdout)


def player(port: int, sizes: Sequence[int], steps: int, name: str) -> None:
    """One side of the raw exchange."""
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

    peer = "b" if name == "a" else "a"
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
    heard = 0

    def on_message(_client: object, _data: object, _message: object) -> None:
        nonlocal heard
        heard += 1

    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.subscribe(f"bench/{name}", qos=1)
    payloads = [bytes(size) for size in sizes]
    ready = time.perf_counter() + 1.0  # both have subscribed by then
    while time.perf_counter() < ready:
        client.loop(0.05)
    begun, sent = time.perf_counter(), 0
    for _ in range(steps):
        for payload in payloads:
            client.publish(f"bench/{peer}", payload, qos=1)
            sent += 1
            while heard < sent:
                client.loop(0.5)
    sys.stdout.write(f"{(time.perf_counter() - begun) / steps}\n")
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        client.loop(0.05)
    client.disconnect()


def run_seconds(steps: int, security: str, check_every: int) -> float:
    """`online_seconds` of so many steps with two compute agents in processes of their own."""
    settings = {
        "train.max_steps": steps, "train.rounds": 1000, "spdz.compute_agents": 2, "spdz.security": security,
        "spdz.check_every": check_every, "simulation.agents": 2,
    }  # fmt: skip
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "sordino_sim.cli", "run", str(JOB), "--json", "--quiet", "--no-baseline"]
    done = subprocess.run(
        [*command, "--transport", "processes", *changes], stdout=subprocess.PIPE, check=True, timeout=600
    )
    return float(json.loads(done.stdout)["online_seconds"])


def step_seconds(security: str, check_every: int) -> float:
    return (run_seconds(LONG, security, check_every) - run_seconds(SHORT, security, check_every)) / (LONG - SHORT)


def report(sizes: Sequence[int], arithmetic_s: float) -> None:
    """`sizes`: bytes of each round's message. `arithmetic_s`: of one member's step, in this process."""
    raw_s = raw_seconds(sizes)
    floor_s = raw_s + arithmetic_s
    floor = f"floor with arithmetic: {floor_s * 1e3:.2f} ms"
    print(f"raw broadcasts of a step ({len(sizes)} rounds): {raw_s * 1e3:.2f} ms; {floor}")
    measured = {}
    for security in ("passive", "active"):
        took_s = measured[security] = step_seconds(security, CHECK_EVERY)
        print(
            f"over mosquitto, 2 members in processes of their own, {security}: {took_s * 1e3:.1f} ms a step, "
            f"{took_s / floor_s:.1f} x floor"
        )
    print(f"active / passive over mosquitto: {measured['active'] / measured['passive']:.2f}")


if __name__ == "__main__":
    player(int(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")], int(sys.argv[3]), sys.argv[4])

"""Memory over many rounds: N simulated agents, R rounds, what the process holds after each twentieth of them.

    python benchmarks/soak.py --agents 100 --rounds 1000        # the full count
    python benchmarks/soak.py --agents 20 --rounds 60 --json    # a sample, as the tests run it

Prints, of the second half of the rounds: how much resident memory and how many Python objects a round adds, by a least
squares line. All parties are in this process: server, broker and agents together. In every tenth round an agent is
killed and comes back.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from sordino_agent.status import resident_bytes
from sordino_common.clock import VirtualLoop
from sordino_server.job import load_job
from sordino_server.rounds.events import Event, RoundDone, RunStarted
from sordino_server.run import run_job
from sordino_server.store import RunStore
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

EXAMPLES = Path(__file__).parents[1] / "examples"


def soak(agents: int, rounds: int, *, secure: bool = False) -> dict[str, object]:
    """`points`: (round, resident bytes, objects); `slope_*`: per round, over the second half."""
    job = load_job(
        EXAMPLES / f"boston-{'secure' if secure else 'fedavg'}.yaml",
        overrides=(
            f"simulation.agents={agents}", f"train.rounds={rounds}", "train.local_epochs=null", "train.local_steps=1",
            "train.batch_rows=4", "train.evaluate_every=0",
            "model.args.hidden=[8]", "train.join_s=5", "train.straggler_s=5", "train.quorum=0.5",
        ),
    )  # fmt: skip
    loop = VirtualLoop()
    scenario = scenario_of(job)
    network = scenario.network(server=SERVER)
    fleet = SimulatedFleet(scenario, loop=loop, wire=MemoryWire(loop, network=network), network=network)
    points: list[tuple[int, int, int]] = []
    every = max(1, rounds // 20)

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted):
            fleet.start_agents()
        if not isinstance(event, RoundDone):
            return
        number = event.record.round
        if number % 10 == 0:
            victim = fleet.members[number // 10 % agents]
            fleet.die(victim)
            loop.call_at(loop.now_s() + 0.01, lambda: fleet.come_back(victim))
        if number % every == 0:
            gc.collect()
            points.append((number, resident_bytes(), len(gc.get_objects())))
            sys.stderr.write(f"round {number}: {points[-1][1] >> 20} MiB, {points[-1][2]} objects\n")

    with (
        tempfile.TemporaryDirectory(prefix="sordino-soak-") as folder,
        RunStore(Path(folder), wall_s=loop.wall_s) as store,
    ):
        conductor = fleet.start_server()
        run_job(
            job,
            run="soak-1",
            conductor=conductor,
            loop=loop,
            store=store,
            members=fleet.members,
            observer=watch,
            world=fleet.world() if secure else None,
        )
    fleet.close()
    half = points[len(points) // 2 :]
    at = np.array([point[0] for point in half], dtype=float)
    slope_bytes = float(np.polyfit(at, [point[1] for point in half], 1)[0])
    slope_objects = float(np.polyfit(at, [point[2] for point in half], 1)[0])
    return {
        "agents": agents,
        "rounds": rounds,
        "points": points,
        "slope_bytes_per_round": slope_bytes,
        "slope_objects_per_round": slope_objects,
        "growth_of_second_half": half[-1][1] / half[0][1] - 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory over many rounds of a simulated fleet.")
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--secure", action="store_true", help="secure sums: helpers, seeds and journals take part")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = soak(given.agents, given.rounds, secure=given.secure)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.agents} agents, {given.rounds} rounds; over the second half:")
    print(f"  resident memory {found['slope_bytes_per_round']:+.0f} bytes a round", end="")
    print(f" ({found['growth_of_second_half']:+.2%} in all)")
    print(f"  Python objects  {found['slope_objects_per_round']:+.2f} a round")


if __name__ == "__main__":
    main()

"""What a round costs besides learning: a model whose step is nearly free, over the whole stack, in one process.

Every round moves parameters to N agents and updates back: encoded, cut into chunks, sealed, acknowledged, checked,
averaged. Printed per round, best of the measured rounds:

    x floor        time over the floor: seal, open and sum the very same bytes, with nothing around them
    ms/agent       for orientation only; it depends on the machine
    bytes ratio    packet bytes both ways over the parameters' own bytes both ways (exact)
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from timing import best_seconds

from sordino_server.job import load_job
from sordino_server.rounds.events import Event, RoundDone
from sordino_sim.runner import simulate

ROUNDS = 4
MODEL = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x[:, 0] + self.w.mean()

def make_model(size):
    return Wide(size)
"""
JOB = """
job: overhead
mode: federated
model: {{file: model.py, args: {{size: {size}}}}}
data: {{dataset: boston, features: [CRIM], target: MEDV, task: regression, standardize: none}}
loss: mse
optimizer: {{name: sgd, lr: 0.000001}}
train: {{rounds: {rounds}, local_steps: 1, batch_rows: 4, evaluate_every: 0, round_deadline_s: 3600, straggler_s: 3600}}
simulation: {{agents: {agents}, data: boston, profile: pi5}}
"""


def floor_seconds(agents: int, size: int) -> float:
    """Seal and open the parameters for each agent, seal and open its update, add it up."""
    cipher = ChaCha20Poly1305(bytes(32))
    values = np.zeros(size, dtype=np.float32)
    total = np.zeros(size, dtype=np.float64)

    def once() -> None:
        for agent in range(agents):
            for way in range(2):
                nonce = (2 * agent + way).to_bytes(12, "big")
                opened = cipher.decrypt(nonce, cipher.encrypt(nonce, memoryview(values.view(np.uint8)), b""), b"")
            np.add(total, np.frombuffer(opened, dtype=np.float32), out=total)

    return best_seconds({"floor": once}, rounds=3)["floor"]


def main() -> None:
    print("agents  parameters   x floor   ms/agent   bytes ratio")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(MODEL, "utf-8")
        for agents in (10, 50):
            for size in (1_000, 1_000_000):
                path = Path(folder) / "job.yaml"
                path.write_text(JOB.format(size=size, agents=agents, rounds=ROUNDS), "utf-8")
                marks: list[float] = []
                records = []

                def observe(event: Event, marks=marks, records=records) -> None:
                    if isinstance(event, RoundDone):
                        marks.append(time.perf_counter())
                        records.append(event.record)

                simulate(load_job(path), observer=observe, with_baseline=False)
                # The first round also sends the Plan and sets sessions up; the last one also evaluates.
                rounds = [after - before for before, after in itertools.pairwise(marks[:-1])]
                record = records[1]
                moved = 2 * 4 * size * agents
                best = min(rounds)
                print(
                    f"{agents:6d}  {size:10,d}  {best / floor_seconds(agents, size):8.1f}  {best / agents * 1e3:9.2f}"
                    f"  {(record.bytes_up + record.bytes_down) / moved:12.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

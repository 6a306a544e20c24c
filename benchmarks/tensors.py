"""What eager style costs: a Boston-sized MLP trained through pointers against the same step as one traced Plan.

Both run on one simulated agent, with the same messages: `tensor-run` for each step, and the loss is fetched. The
traced Plan is sent by hand, without pointers. Turns are taken in one run; the best of many slices counts.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from timing import best_seconds
from torch import nn

import sordino_server as sordino
from sordino_common.messages import PlanPut, PlanReady, TensorGet, TensorRun, TensorStored, TensorValue
from sordino_server.tensors.messages import question
from sordino_server.trace.tracing import trace

FEATURES, HIDDEN, LR = 13, 64, 0.01


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def main() -> None:
    """Print ratio and exact counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=404, help="rows of a step; Boston Housing has 404 to train on")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(options.rows, FEATURES), torch.randn(options.rows, 1)
    with sordino.simulate(agents=2) as fleet:
        alice, bob = fleet["alice"], fleet["bob"]
        endpoint = fleet._driver.fleet.server_endpoint  # type: ignore[attr-defined]
        counters = endpoint.counters.total

        model = fleet.send(network(), alice)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        x_there, y_there = alice.send(x), alice.send(y)
        losses: list[float] = []

        def pointers() -> None:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x_there), y_there)
            loss.backward()
            optimizer.step()
            losses.append(loss.get().item())  # type: ignore[attr-defined]

        params = [parameter.detach() for parameter in network().parameters()]

        def step(*tensors: torch.Tensor) -> list[torch.Tensor]:
            def loss_of(weights: list[torch.Tensor]) -> torch.Tensor:
                hidden = torch.tanh(nn.functional.linear(tensors[4], weights[0], weights[1]))
                return nn.functional.mse_loss(nn.functional.linear(hidden, weights[2], weights[3]), tensors[5])

            gradients, loss = torch.func.grad_and_value(loss_of)(list(tensors[:4]))
            updated = [w - LR * g for w, g in zip(tensors[:4], gradients, strict=True)]
            return [*updated, loss]

        traced = trace(
            step,
            [*params, x, y],
            inputs=[(f"i{k}", "value") for k in range(6)],
            outputs=[(f"o{k}", "value") for k in range(5)],
            name="step",
        )
        kept = [bob.send(tensor) for tensor in (*params, x, y)]
        ids: list[bytes] = [pointer.cell.value.tensor_id or b"" for pointer in kept]
        drive, terms = fleet._driver.drive, fleet._terms
        drive(question(terms, "plan", {"bob": PlanPut(plan=traced.data)}, PlanReady))
        drops: list[tuple[bytes, ...]] = [()]
        by_hand: list[float] = []

        def plan() -> None:
            outputs = tuple(os.urandom(16) for _ in range(5))
            run = TensorRun(
                plan_id=traced.plan_id, inputs=tuple(ids), outputs=outputs, drops=drops[0], lease_s=terms.lease_s
            )
            answers = drive(question(terms, "run", {"bob": run}, TensorStored))
            assert "bob" in answers.replies, answers
            drops[0] = (*ids[:4], outputs[4])
            ids[:4] = outputs[:4]
            answers = drive(question(terms, "get", {"bob": TensorGet(tensor_id=outputs[4])}, TensorValue))
            reply = answers.replies["bob"]
            assert isinstance(reply, TensorValue)
            by_hand.append(float(torch.frombuffer(bytearray(reply.value.data), dtype=torch.float32)))

        for function in (pointers, plan):
            for _ in range(3):
                function()
        figures = {}
        for name, function in (("pointers", pointers), ("plan", plan)):
            before = (counters.packet_bytes_sent, counters.packet_bytes_received, len(fleet.trace()))
            for _ in range(20):
                function()
            figures[name] = (
                (counters.packet_bytes_sent - before[0]) / 20,
                (counters.packet_bytes_received - before[1]) / 20,
            )
        assert torch.allclose(torch.tensor(losses[:23]), torch.tensor(by_hand[:23]), rtol=1e-4)
        best = best_seconds({"pointers": pointers, "plan": plan}, rounds=options.rounds, slice_s=0.2)
        print(f"rows {options.rows}; pointers / plan: {best['pointers'] / best['plan']:.2f}")
        for name, (sent, received) in figures.items():
            print(
                f"{name:9} {best[name] * 1e3:7.2f} ms   {sent:8.0f} bytes sent   {received:8.0f} bytes received a step"
            )


if __name__ == "__main__":
    main()

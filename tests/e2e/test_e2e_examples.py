"""The examples as they are shipped: federated training ends where plain PyTorch ends, same rows, epochs and seed.

One-sided on purpose: averaging over devices may well do better on a small test set, and that is no failure. The
settings were chosen on these very seeds, so this guards against regressions; it is not an independent measurement.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino_server.job import load_job
from sordino_sim.runner import simulate

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def both(name: str, metric: str) -> tuple[float, float]:
    summary = simulate(load_job(EXAMPLES / f"{name}.yaml")).summary
    return summary["metrics"][metric], summary["baseline"][metric]


@pytest.mark.slow
def test_boston_is_within_5_percent() -> None:
    fleet, plain = both("boston-fedavg", "test_mse")
    assert fleet <= 1.05 * plain


@pytest.mark.slow
def test_pima_is_within_5_percent() -> None:
    fleet, plain = both("pima-fedavg", "test_accuracy")
    assert fleet >= 0.95 * plain


@pytest.mark.slow
def test_mnist_is_within_a_point() -> None:
    fleet, plain = both("mnist-cnn-fedavg", "test_accuracy")
    assert fleet >= plain - 0.01

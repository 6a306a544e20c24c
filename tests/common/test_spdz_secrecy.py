"""What parties that work together see does not depend on what the others hold.

Two fixed sets of inputs (rows and parameters), many sessions with fresh randomness each. For every n - 1 of n members,
and for the server (the dealer, who sees no masked value before the outputs), everything they see is collected: each
other member's openings, the masked inputs, their own shares. The distributions of its bytes under the two inputs are
compared by a chi-square test per position group and byte; the false-alarm chance of the whole test is below 10^-6.
"""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest

from helpers_spdz import Committee, toy_circuit, toy_rows, toy_spec, toy_state
from sordino_common.spdz.effects import Broadcast

SESSIONS = 4_000 if os.environ.get("SORDINO_SOAK") else 400
ALARM = 1e-6


def views(which: int, sessions: int) -> dict[tuple[str, int], np.ndarray]:
    """(what, byte of the 64-bit word) -> its histogram over all elements and sessions."""
    counts: dict[tuple[str, int], np.ndarray] = {}

    def count(what: str, words: np.ndarray) -> None:
        raw = np.ascontiguousarray(words, dtype="<i8").view(np.uint8).reshape(-1, 8)
        for byte in range(8):
            table = counts.setdefault((what, byte), np.zeros(256, dtype=np.int64))
            table += np.bincount(raw[:, byte], minlength=256)

    spec = toy_spec(3, steps=1, check_every=1, circuit=toy_circuit(), owners=(("ada", 4),))
    rows, state = toy_rows(spec, seed=which), toy_state(spec, seed=which)
    if which:  # as different as the ranges allow
        rows = {"ada": {name: value * 0 for name, value in rows["ada"].items()}}
        state = {name: value * 0 + 16_384 for name, value in state.items()}
    for session in range(sessions):
        committee = Committee(spec, rows, state, seed=2 * session + which)
        for k, party in enumerate(committee.parties):
            take = party.on_input
            if k == 0:
                party.on_input = (  # type: ignore[method-assign]
                    lambda owner, step, attempt, masked, take=take: (
                        [count("input", value) for value in masked.values()],
                        take(owner, step, attempt, masked),
                    )[1]
                )
        committee.run()
        openings: dict[tuple[int, int], np.ndarray] = {
            (k, m.round): np.frombuffer(m.payload, dtype="<i8")
            for k, m in committee.sent
            if isinstance(m, Broadcast) and m.kind == "open"
        }
        for round_ in range(len(spec.circuit.rounds)):
            shares = [openings[(k, round_)] for k in range(3)]
            with np.errstate(over="ignore"):
                count(f"D, round {round_}", shares[0] + shares[1] + shares[2])
                for pair in itertools.combinations(range(3), 2):  # what these two do not hold: the third's share
                    (third,) = {0, 1, 2} - set(pair)
                    count(f"share of {third}, round {round_}", shares[third])
    return counts


def score(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sample chi-square of two histograms, as a standard normal score (Wilson-Hilferty: the cube root of X / k is
    normal with mean 1 - 2/(9k) and variance 2/(9k))."""
    seen = (mine + theirs) > 0
    a, b = mine[seen].astype(float), theirs[seen].astype(float)
    expected_a, expected_b = (a + b) * a.sum() / (a + b).sum(), (a + b) * b.sum() / (a + b).sum()
    statistic = float(((a - expected_a) ** 2 / expected_a + (b - expected_b) ** 2 / expected_b).sum())
    freedom = int(seen.sum()) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def test_the_test_can_fail() -> None:
    """A mask that misses one value in 64 is enough: 400 sessions of 50 words are told apart."""
    rng = np.random.default_rng(0)
    fair = np.bincount(rng.integers(0, 256, 20_000), minlength=256)
    leaky = np.bincount(np.where(rng.random(20_000) < 1 / 64, 7, rng.integers(0, 256, 20_000)), minlength=256)
    assert score(fair, np.bincount(rng.integers(0, 256, 20_000), minlength=256)) < 6.1
    assert score(fair, leaky) > 6.1


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_inputs_look_alike() -> None:
    one, other = views(0, SESSIONS), views(1, SESSIONS)
    assert one.keys() == other.keys()
    worst = max(score(mine, other[key]) for key, mine in one.items())
    limit = 6.1  # the normal tail beyond 6.1 is 5·10^-10; with fewer than 1,000 tables, below 10^-6
    assert len(one) * 5.3e-10 < ALARM
    print(f"{len(one)} tables, {SESSIONS} sessions: the largest score is {worst:.2f}, the limit {limit}")
    assert worst < limit


def test_sizes_and_counts_depend_on_shapes_only() -> None:
    spec = toy_spec(3, steps=2)
    shapes = []
    for which in (0, 1):
        committee = Committee(spec, toy_rows(spec, seed=which), toy_state(spec, seed=which), seed=which)
        committee.run()
        shapes.append(sorted((k, m.kind, m.step, m.round, len(m.payload)) for k, m in committee.sent))
    assert shapes[0] == shapes[1]


def test_nothing_secret_is_in_a_repr() -> None:
    spec = toy_spec(2)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    deal = committee.dealer.deal(0, 0)
    assert repr(deal).endswith(f"{len(deal.correction)} bytes)")
    assert repr(committee.dealer.setup(0)) == "PartySetup(hidden)"
    message = Broadcast(kind="open", step=0, attempt=0, round=0, payload=b"secret")
    assert "secret" not in repr(message)

"""A committee in one process computes what the integers say: every wire of every step, for n = 2, 3, 4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers_spdz import (
    Builder,
    Committee,
    F,
    SlowField,
    batches,
    evaluate_node,
    fixed,
    odd_circuit,
    toy_rows,
    toy_spec,
    toy_state,
)
from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed
from sordino_common.spdz import check, dealing, reference
from sordino_common.spdz.circuit import Circuit, Gate
from sordino_common.spdz.errors import OutOfRange, ProtocolError, SessionDead, UncheckedOpenings
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.spec import Schedule, Security, SessionSpec

P127 = 2**127 - 1


def watched(committee: Committee) -> dict[tuple[int, int], list[Any]]:
    """(step, attempt) -> λ of every wire, filled in as the dealer deals."""
    seen: dict[tuple[int, int], list[Any]] = {}
    dealer = committee.dealer
    deal_ahead, follow = dealer._deal_ahead, dealer._follow
    at = [0, 0]

    def ahead(step: int, attempt: int) -> None:
        at[:] = step, attempt
        deal_ahead(step, attempt)

    def followed(values: Any, gate_r: Any) -> None:
        follow(values, gate_r)
        seen[at[0], at[1]] = list(values)
        at[0] += 1

    dealer._deal_ahead, dealer._follow = ahead, followed  # type: ignore[method-assign]
    return seen


def assert_step_is_right(circuit: Circuit, values: list[Any], masks: list[Any]) -> None:
    """x = m - λ of every wire is what its node makes of the actual operands; a gate's, within one rounding."""
    actual = [
        np.asarray(np.asarray(m).astype(object) - np.asarray(mask).astype(object), dtype=object)
        for m, mask in zip(values, masks, strict=True)
    ]
    first = len(circuit.inputs)
    for number, node in enumerate(circuit.nodes, start=first):
        expected = evaluate_node(circuit, node, actual)
        found = actual[number]
        assert found.shape == node.wire.shape
        if not isinstance(node, Gate):
            assert (found == expected).all(), node
            continue
        low = expected >> node.shift
        assert ((found == low) | (found == low + 1)).all(), node
        assert all(abs(int(mask)) <= 1 << (63 - node.shift) for mask in np.asarray(masks[number]).reshape(-1))


@pytest.mark.parametrize("security", ["active", "passive"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_wire_of_every_step(n: int, security: Security) -> None:
    spec = toy_spec(n, security=security, steps=4, check_every=3)
    rows, state = toy_rows(spec), toy_state(spec)
    committee = Committee(spec, rows, state)
    masks = watched(committee)
    runs: dict[int, list[Any]] = {}
    for party in committee.parties:
        original = party._end_step

        def end_step(effects: Any, party: Any = party, original: Any = original) -> None:
            before = runs.setdefault(party._step, [np.array(value) for value in party._run.values])
            for mine, theirs in zip(party._run.values, before, strict=True):
                assert np.array_equal(mine, theirs)  # m is the same at every member
            original(effects)

        party._end_step = end_step  # type: ignore[method-assign]
    committee.run()
    assert [[c.step for c in checked] for checked in committee.checked] == [[2, 3]] * n
    assert [party.checks for party in committee.parties] == [2 if security == "active" else 0] * n
    for step, batch in enumerate(batches(spec, rows)):
        assert_step_is_right(spec.circuit, runs[step], masks[(step, committee.attempts[step])])
        for number, entry in enumerate(spec.circuit.inputs):
            if entry.name in batch:  # and the inputs are what their owners hold, exactly
                x = runs[step][number] - masks[(step, committee.attempts[step])][number]
                assert np.array_equal(x, batch[entry.name])


def test_messages_are_one_per_party_and_round_and_no_byte_more_than_the_openings() -> None:
    spec = toy_spec(3, steps=3, check_every=3)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    committee.run()
    opened = [8 * count for count in spec.circuit.opened_elements]
    for party in range(3):
        sizes = [len(m.payload) for k, m in committee.sent if k == party and m.kind == "open"]
        assert sizes == opened * 3
        assert [len(m.payload) for k, m in committee.sent if k == party and m.kind != "open"] == [64, 32, 32, 48]


def test_the_correction_rotates_and_has_the_stated_size() -> None:
    spec = toy_spec(3, steps=4)
    dealer = dealing.Dealer(spec, Seed(bytes(32)))
    deals = [dealer.deal(step, 0) for step in range(4)]
    assert [deal.corrected for deal in deals] == [0, 1, 2, 0]
    assert {len(deal.correction) for deal in deals} == {layout_of(spec.circuit).preprocessing_bytes(active=True)}


@pytest.mark.parametrize("odd", [False, True])
def test_tags_are_what_the_integers_say(odd: bool) -> None:
    """The fast field's and the slow one's; and the last one is α times all γ, each with its coefficient."""
    spec = toy_spec(2, steps=1, **({"circuit": odd_circuit(), "owners": (("ada", 3),)} if odd else {}))
    fast = dealing.Dealer(spec, Seed(bytes(32)))
    slow = dealing.Dealer(spec, Seed(bytes(32)), field=SlowField(P127))
    assert fast._alpha == slow._alpha
    values = fast._input_masks(0, 0, fast._state)
    gate_r = np.random.default_rng(0).integers(-(2**63), 2**63, fast._layout.gate_elements)
    fast._follow(values, gate_r)
    made = []
    for dealer in (fast, slow):
        tags = np.zeros((2, fast._layout.tagging.tags), dtype=np.uint64)
        numbers = dealer._numbers(0, 0, values, gate_r, tags)
        assert dealer._sums is not None
        dealer._sums.deal(dealer._field, [numbers], dealer._alpha)
        made.append(tags)
    assert np.array_equal(*made)
    gammas = exact_gammas(fast, values, gate_r)
    sum_of_all = sum(c * gamma for c, gamma in zip(coefficients_of(fast, numbers), gammas, strict=True))
    low, high = made[0][:, -1].tolist()
    assert low + (high << 64) == fast._alpha * sum_of_all % P127
    with np.errstate(over="ignore"):
        fast._add_parts(values, gate_r)
    assert [gamma % 2**64 for gamma in gammas] == [int(v) % 2**64 for v in gate_r]


def test_one_call_deals_a_few_steps_at_most() -> None:
    """Whoever asks for one waits for eight, of however many would fit; a retry throws no more away."""
    b = Builder()
    x = b.input("x", "x", (1, 1), 4.0)
    circuit = b.circuit(out=("value", b.gate([("mul", x, x, 1)], shape=(1, 1))))
    dealer = dealing.Dealer(toy_spec(2, circuit=circuit, steps=1000, owners=(("ada", 1),)), Seed(bytes(32)))
    dealer.deal(0, 0)
    assert len(dealer._ahead) == 7
    dealer.rewind(0, 1)
    assert not dealer._ahead


def test_a_linear_node_without_dimensions() -> None:
    """NumPy makes scalars of arrays without dimensions when they are multiplied."""
    b = Builder()
    x = b.input("x", "x", (2, 1), 2.0)
    total = b.gate([("mul", x, x, 1, (0, 1))], shape=())
    circuit = b.circuit(out=("value", b.linear((2, total), (-3, total), constant=9)))
    spec = toy_spec(2, circuit=circuit, steps=1, owners=(("ada", 2),))
    committee = Committee(spec, toy_rows(spec), {})
    committee.run()
    assert committee.outputs(0)["out"].shape == ()


def coefficients_of(dealer: dealing.Dealer, numbers: Any) -> list[int]:
    """Of every element that opens, in the gates' order."""
    tagging = dealer._layout.tagging
    drawn = [int(c) for c in numbers.coefficients]
    of_gate: dict[int, list[int]] = {number: drawn[at] for number, at in tagging.bare.items()}
    for family in tagging.families:
        if family.rho is not None:
            for number in family.gates:
                of_gate[number] = [numbers.kappas[tagging.kappas[number]] * rho for rho in drawn[family.rho]]
    for gate in tagging.matrix_gates:
        of_gate[gate.gate] = [chi * psi for chi in drawn[gate.rows] for psi in drawn[gate.columns]]
    return [c for number in dealer._layout.gates for c in of_gate[number]]


def test_steps_dealt_together_are_those_dealt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of steps is evaluated at once, over the end of a check too, and after a step is dealt again."""
    spec = toy_spec(3, steps=7, check_every=3)
    corrections = []
    for together in (1 << 17, 1):
        monkeypatch.setattr(check, "_TOGETHER", together)
        dealer = dealing.Dealer(spec, Seed(bytes(32)))
        deals = [dealer.deal(step, 0) for step in range(4)]
        dealer.rewind(2, 1)
        deals += [dealer.deal(step, 1) for step in range(2, 7)]
        corrections.append([deal.correction for deal in deals])
    assert corrections[0] == corrections[1]
    assert len(set(corrections[0])) == 9


def exact_gammas(dealer: dealing.Dealer, values: list[Any], gate_r: Any) -> list[int]:
    """γ of every gate, by Python's integers."""
    whole: list[int] = []
    for number, place in dealer._layout.gates.items():
        gate = dealer.spec.circuit.node(number)
        assert isinstance(gate, Gate)
        gamma = gate_r[place].astype(object).reshape(gate.wire.shape)
        for product in gate.products:
            gamma = gamma + reference.product(
                product, values[product.a].astype(object), values[product.b].astype(object)
            )
        for term in gate.terms:
            gamma = gamma - term.coefficient * values[term.operand].astype(object)
        whole += np.asarray(gamma, dtype=object).reshape(-1).tolist()
    return whole


def test_the_edge_of_the_ring_is_met_and_the_step_runs_again() -> None:
    """With bounds so wide that the edge is near, some attempts are thrown away and the result is right all the same."""
    b = Builder()
    x = b.input("x", "x", (8, 4), 4.0)
    product = b.gate([("mul", x, x, 1)], shape=(8, 4), bound_bits=58)
    circuit = b.circuit(square=("value", product))
    spec = toy_spec(2, circuit=circuit, steps=6, retries=20, owners=(("ada", 20),))
    rows = toy_rows(spec)
    committee = Committee(spec, rows, {}, seed=3)
    committee.run()
    assert committee.retries > 0  # 32 elements, chance 1/32 each: a step meets the edge in 64 % of attempts
    for step, batch in enumerate(batches(spec, rows)):
        expected = (batch["x"].astype(object) ** 2) >> F
        found = committee.outputs(step)["square"].astype(object)
        assert ((found == expected) | (found == expected + 1)).all()


def test_no_more_retries_than_the_session_allows() -> None:
    from sordino_common.spdz.errors import RetriesExhausted

    b = Builder()
    x = b.input("x", "x", (8, 4), 4.0)
    circuit = b.circuit(square=("value", b.gate([("mul", x, x, 1)], shape=(8, 4), bound_bits=62)))
    spec = toy_spec(2, circuit=circuit, steps=1, retries=2, owners=(("ada", 20),))
    committee = Committee(spec, toy_rows(spec), {})
    with pytest.raises(RetriesExhausted, match=r"step 0 met the edge of the ring 3 times, at most 2 are likely"):
        committee.run()


def test_a_checkpoint_goes_on_as_if_nothing_had_happened() -> None:
    """State after step 1: m at the parties, λ at the dealer. A new session resumes with them and computes on."""
    spec = toy_spec(3, steps=2)
    rows, state = toy_rows(spec), toy_state(spec)
    committee = Committee(spec, rows, state)
    committee.run()
    held, masks = committee.checked[0][-1].state, committee.dealer.state(1)
    later = SessionSpec(
        session=b"the-next-session", circuit=spec.circuit, circuit_digest=bytes(32), parties=spec.parties,
        security="active", steps=4, check_every=1, retries=3, schedule=spec.schedule,
    )  # fmt: skip
    resumed = Committee(later, rows, state, masks=masks, held=held, first_step=2)
    resumed.run()
    start = {name: held[name] - masks[name] for name in held}
    batch = list(batches(later, rows))[2]
    values = [({**batch, **start})[entry.name].astype(object) for entry in spec.circuit.inputs]
    for node in spec.circuit.nodes:
        found = evaluate_node(spec.circuit, node, values)
        values.append(found >> node.shift if isinstance(node, Gate) else found)
    change = values[spec.state_outputs["w"]] - resumed.state_after(2)["w"].astype(object)
    assert np.abs(change).max() <= 2


def test_a_batch_outside_its_stated_range_is_refused_without_a_word_of_the_value() -> None:
    spec = toy_spec(2)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    values = {"x": fixed(np.full((2, 3), 1e6)), "y": fixed(np.zeros((2, 2)))}
    with pytest.raises(OutOfRange, match=r"input x: a value is not within the 4 that the job states for x") as caught:
        committee.owners["ada"].masked(0, 0, values)
    assert "1000000" not in str(caught.value)


def test_a_session_closed_with_unchecked_openings_says_so() -> None:
    spec = toy_spec(2, steps=3, check_every=3)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    committee.start()
    committee.play(0)
    with pytest.raises(UncheckedOpenings, match="closed at step 1 with openings that were not checked"):
        committee.parties[0].close()
    with pytest.raises(SessionDead, match="closed"):
        committee.parties[0].on_restart(0, 1)
    committee.parties[1].abandon()
    with pytest.raises(SessionDead, match="abandoned"):
        committee.parties[1].on_restart(0, 1)


def test_waiting_names_who_is_missing() -> None:
    spec = toy_spec(3)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    assert committee.parties[2].waiting_for == "the first parameters"
    committee.start()
    assert committee.parties[2].waiting_for.startswith("step 0: the rows of ")
    committee.feed(0, 0)
    assert committee.parties[2].waiting_for == "step 0: open of party-0, party-1"


def test_messages_that_the_protocol_does_not_have_are_refused_by_name() -> None:
    spec = toy_spec(2)
    size = 8 * spec.circuit.opened_elements[0]
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((0, "open", 0, 0, 0, bytes(size)), "there is no other party 0"),
        ((1, "open", 0, 0, 0, bytes(size - 8)), rf"party-1 sent {size - 8} bytes as open of round 0, expected {size}"),
        ((1, "open", 0, 0, 99, bytes(size)), "opened round 99"),
        ((1, "open", 5, 0, 0, bytes(size)), "step 5 attempt 0, we are at step 0"),
        ((1, "open", 0, 9, 0, bytes(size)), "step 0 attempt 9"),
        ((1, "gossip", 0, 0, 0, b""), "unknown kind 'gossip'"),
        ((1, "check-1", 0, 0, 0, bytes(63)), "63 bytes as check-1"),
        ((1, "check-1", 0, 0, 1, bytes(64)), "check-1 of round 1"),
    ]
    for arguments, text in cases:
        party = Committee(spec, toy_rows(spec), toy_state(spec)).parties[0]
        with pytest.raises(ProtocolError, match=text):
            party.on_message(*arguments)
        with pytest.raises(SessionDead):
            party.on_message(*arguments)


def test_two_contents_for_one_place_are_refused() -> None:
    spec = toy_spec(3)
    size = 8 * spec.circuit.opened_elements[0]
    party = Committee(spec, toy_rows(spec), toy_state(spec)).parties[0]
    assert party.on_message(1, "open", 0, 0, 0, bytes(size)) == []
    assert party.on_message(1, "open", 0, 0, 0, bytes(size)) == []
    with pytest.raises(ProtocolError, match="party-1 sent two different messages: open of step 0 round 0"):
        party.on_message(1, "open", 0, 0, 0, bytes(size - 1) + b"1")


def test_the_schedule_passes_over_every_row_once_and_begins_the_next_batch_with_the_leftover() -> None:
    schedule = Schedule(rows=(("ada", 5), ("bob", 7)), batch_rows=5, seed=3)
    seen: list[tuple[str, int]] = []
    for step in range(12):
        slices = schedule.step(step)
        batch: dict[int, tuple[str, int]] = {}
        for part in slices:
            batch.update(zip(part.positions.tolist(), ((part.owner, row) for row in part.rows.tolist()), strict=True))
        assert sorted(batch) == list(range(5))
        seen += [batch[k] for k in range(5)]
    everybody = {("ada", k) for k in range(5)} | {("bob", k) for k in range(7)}
    for start in range(0, 60, 12):
        assert set(seen[start : start + 12]) == everybody
    assert seen[:12] != seen[12:24]


def test_by_owner_pads_the_last_batch_of_each() -> None:
    schedule = Schedule(rows=(("ada", 5), ("bob", 2)), batch_rows=3, seed=0, order="by-owner")
    assert schedule.steps_per_pass == 3
    found = [(s.owner, s.rows.tolist()) for k in range(3) for s in schedule.step(k)]
    assert found == [("ada", [0, 1, 2]), ("ada", [3, 4, -1]), ("bob", [0, 1, -1])]
    with pytest.raises(LocalError, match="no such step"):
        schedule.step(3)

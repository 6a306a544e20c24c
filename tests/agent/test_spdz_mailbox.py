"""What waits in a session's mailbox, and for whom."""

from __future__ import annotations

import random

import pytest

from sordino_agent.spdz.mailbox import EARLY_BYTES, MOST_EARLY, MOST_EVENTS, MOST_ROUNDS, TASK_BYTES, Mailbox
from sordino_agent.spdz.tasks import SpdzEvent
from sordino_common.messages import Array, SpdzShare
from sordino_common.spdz.errors import ProtocolError


def share(round_: int, *, kind: str = "open", step: int = 0, payload: bytes = b"") -> SpdzShare:
    return SpdzShare(kind=kind, step=step, attempt=0, round=round_, payload=payload)  # type: ignore[arg-type]


def test_a_round_waits_for_every_other_party_and_all_else_for_nobody() -> None:
    mailbox = Mailbox(others=2)
    mailbox.put_shares("b", (share(0), share(1)))
    assert mailbox.take() == ()
    assert mailbox.missing() == {"open of step 0 round 0": ("b",), "open of step 0 round 1": ("b",)}
    mailbox.put(SpdzEvent(what="correction", step=1))
    mailbox.put_shares("c", (share(1),))
    assert [(event.what, event.sender, event.round) for event in mailbox.take()] == [
        ("correction", "", 0),
        ("share", "b", 1),
        ("share", "c", 1),
    ]
    assert mailbox.missing() == {"open of step 0 round 0": ("b",)}
    mailbox.put_shares("b", (share(0, payload=b"another"),))  # the party decides
    assert [event.data for event in mailbox.take()] == [b"another"]


def test_with_one_other_party_a_share_is_ready_as_if_it_had_been_waited_for() -> None:
    """The way of pairs is the general one for one other party."""
    drawn = random.Random(1)
    for _ in range(50):
        pair, general = Mailbox(others=1), Mailbox(others=1)
        for _ in range(drawn.randrange(40)):
            one = share(drawn.randrange(3), kind=drawn.choice(("open", "check-1")), payload=drawn.randbytes(2))
            pair.put_shares("b", (one,))
            general._gather(
                SpdzEvent(what="share", sender="b", kind=one.kind, round=one.round, data=one.payload),
            )
            assert pair.missing() == general.missing() == {}
        assert pair.take() == general.take()


def test_what_is_early_goes_along_or_when_its_step_is_reached() -> None:
    mailbox = Mailbox(others=1)
    early = [SpdzEvent(what="correction", step=step) for step in (7, 5, 6)]
    for event in early:
        mailbox.put_early(event)
    assert mailbox.ready == []
    mailbox.reached(5)
    assert mailbox.ready == [early[1]]
    mailbox.put_shares("b", (share(0),))
    taken = mailbox.take()
    assert [event.step for event in taken if event.what == "correction"] == [5, 7, 6]
    assert len(taken) == 4
    assert mailbox.take() == ()
    mailbox.reached(7)
    assert mailbox.ready == []


def test_what_is_large_or_one_too_many_does_not_wait() -> None:
    mailbox = Mailbox(others=1)
    large = SpdzEvent(what="correction", step=9, data=bytes(EARLY_BYTES + 1))
    mailbox.put_early(large)
    assert mailbox.ready == [large]
    for step in range(10, 11 + MOST_EARLY):
        mailbox.put_early(SpdzEvent(what="correction", step=step))
    assert [event.step for event in mailbox.ready] == [9, 10 + MOST_EARLY]
    assert len(mailbox.take()) == MOST_EARLY + 2


@pytest.mark.parametrize("rows", [False, True])
def test_a_crossing_carries_so_many_bytes_or_one_event(rows: bool) -> None:
    mailbox = Mailbox(others=1)
    sizes = (TASK_BYTES // 2, TASK_BYTES // 2, 1, TASK_BYTES + 1, 0, 5)
    for step, size in enumerate(sizes):
        if rows:
            values = (
                Array("uint8", (size // 2,), bytes(size // 2)),
                Array("uint8", (-(-size // 2),), bytes(-(-size // 2))),
            )
            mailbox.put(SpdzEvent(what="input", step=step, names=("x", "y"), values=values))
        else:
            mailbox.put(SpdzEvent(what="correction", step=step, data=bytes(size)))
    taken = []
    while mailbox.ready:
        taken.append([event.step for event in mailbox.take()])
    assert taken == [[0, 1], [2], [3], [4, 5]]


def test_a_task_takes_the_openings_of_one_round() -> None:
    """Of however many members; messages of a check go along with either."""
    for others in ("b", "bc"):
        mailbox = Mailbox(others=len(others))
        mailbox.put(SpdzEvent(what="correction", step=9))
        for sender in others:
            mailbox.put_shares(sender, (share(4), share(0, kind="check-1"), share(5), share(6)))
        mailbox.put(SpdzEvent(what="restart"))
        mailbox.put_early(SpdzEvent(what="correction", step=11))
        taken = []
        while mailbox.ready:
            taken.append([event.kind[:1] + str(event.round) if event.kind else event.what for event in mailbox.take()])
        k = len(others)
        assert taken == [
            ["correction", *["o4"] * k, *["c0"] * k],
            ["o5"] * k,
            [*["o6"] * k, "restart", "correction"],
        ]
    assert mailbox.take() == ()


def test_no_more_waits_than_fits() -> None:
    for others in (1, 2):
        mailbox = Mailbox(others=others)
        for _ in range(MOST_EVENTS):
            mailbox.put(SpdzEvent(what="masks"))
        with pytest.raises(ProtocolError, match="4096 messages wait for this device, no more are taken"):
            mailbox.put(SpdzEvent(what="masks"))
        with pytest.raises(ProtocolError, match="4096 messages wait"):
            mailbox.put_shares("b", (share(0),))
        assert len(mailbox.take()) == MOST_EVENTS
    mailbox.put_shares("b", tuple(share(k) for k in range(MOST_ROUNDS)))
    with pytest.raises(ProtocolError, match="b sends shares of round after round that others have not reached"):
        mailbox.put_shares("b", (share(MOST_ROUNDS),))

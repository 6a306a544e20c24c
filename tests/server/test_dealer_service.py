"""A dealer of its own: what it refuses by name, and on whose word masks leave."""

from __future__ import annotations

import random

import msgspec
import pytest

from helpers_agent import SERVER, TRAIN_PLAN
from helpers_channel import entry, roster
from helpers_shares import NAMES, Packet, open_command
from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.clock import VirtualLoop
from sordino_server.dealer.masks import MaskStore
from sordino_server.dealer.service import DealerService

DEALER = "midas"
COMMAND = open_command(dealer=DEALER, outputs=(m.SpdzOutput(name="loss", receiver=SERVER),))


def known(*roles: str) -> Roster:
    return roster(
        entries=[
            entry(SERVER, roles=("server",)),
            entry(DEALER, roles=roles or ("dealer",)),
            *(entry(name, roles=("data", "compute")) for name in NAMES),
        ]
    )


class Place:
    def __init__(self, store: MaskStore | None = None, roster: Roster | None = None) -> None:
        self.loop = VirtualLoop()
        self.service = DealerService(
            name=DEALER, server=SERVER, loop=self.loop, store=store or MaskStore(None),
            random=random.Random(5).randbytes, stopwatch=lambda: 0.0,
        )  # fmt: skip
        self.service.on_roster(roster or known())
        self.service.attach(self)
        self.sent: list[tuple[str, m.Message]] = []
        self.tell(m.PlanPut(plan=TRAIN_PLAN))

    def send(self, to: str, message: m.Message, **more: object) -> bytes:
        self.sent.append((to, m.decode_message(m.encode_message(message))))
        return b""

    def tell(self, message: m.Message, sender: str = SERVER) -> None:
        packet = Packet(sender=sender, to=DEALER, message=message, correlation=bytes(16), context=b"")
        self.service.on_message(packet)
        self.loop.advance(1.0)

    def got(self, kind: type[m.Message]) -> list[tuple[str, m.Message]]:
        return [(to, message) for to, message in self.sent if isinstance(message, kind)]

    def refusal(self) -> m.Refused:
        ((to, found),) = self.got(m.Refused)
        assert to == SERVER and isinstance(found, m.Refused)
        return found


def checked(step: int, command: m.SpdzOpen = COMMAND) -> m.SpdzChecked:
    """A party's word to the dealer."""
    terms = m.terms_of(command)
    return m.SpdzChecked(session=command.session, step=step, checkpoint=0, outputs=(), terms=terms)


def begun() -> Place:
    place = Place()
    place.tell(COMMAND)
    place.tell(m.SpdzConfirm(session=COMMAND.session, step=0))
    return place


def test_it_lowers_the_plan_itself_and_deals_only_when_all_are_ready() -> None:
    place = Place()
    place.tell(COMMAND)
    ((to, ready),) = place.got(m.SpdzReady)
    assert to == SERVER and isinstance(ready, m.SpdzReady)
    assert ready.digest == COMMAND.digest
    assert place.got(m.SpdzSetup) == place.got(m.SpdzCorrection) == []
    place.tell(m.SpdzConfirm(session=COMMAND.session, step=0))
    setups = dict(place.got(m.SpdzSetup))
    assert set(setups) == {*NAMES, SERVER}
    mine = setups[SERVER]
    assert isinstance(mine, m.SpdzSetup)  # of the first parameters, which are the server's own
    assert (mine.party_seed, mine.mac_key, mine.owner_seed) == (None, None, None)
    assert len(place.got(m.SpdzCorrection)) == COMMAND.ahead
    assert {to for to, _ in place.got(m.SpdzCorrection)} <= set(NAMES)


def test_who_provides_the_model_or_reads_an_output_gets_its_part() -> None:
    outputs = (m.SpdzOutput(name="model", receiver="reader"),)
    command = open_command(dealer=DEALER, state_from="owner", outputs=outputs, checkpoints=())
    place = Place()
    place.tell(command)
    place.tell(m.SpdzConfirm(session=command.session, step=0))
    setups = dict(place.got(m.SpdzSetup))
    assert set(setups) == {*NAMES, "owner", "reader"}
    seeds = {name: setup.state_seed is not None for name, setup in setups.items()}  # type: ignore[attr-defined]
    assert seeds == {**dict.fromkeys(NAMES, False), "owner": True, "reader": False}
    for step in (2, 4, 6):
        for name in NAMES:
            place.tell(checked(step, command), sender=name)
        place.tell(m.SpdzConfirm(session=command.session, step=step))
    assert [to for to, _ in place.got(m.SpdzMasks)] == ["reader"]
    place.tell(m.SpdzAbort(session=command.session, code="x", reason=""), sender="owner")
    assert place.service.sessions == 0


def test_a_step_that_all_have_checked_runs_never_again() -> None:
    place = begun()
    for name in NAMES:
        place.tell(checked(2), sender=name)
    dealt = len(place.got(m.SpdzCorrection))
    place.tell(m.SpdzRestart(session=COMMAND.session, step=1, attempt=1))
    assert place.service.refusals == 1
    assert len(place.got(m.SpdzCorrection)) == dealt
    place.tell(m.SpdzRestart(session=COMMAND.session, step=2, attempt=1))
    assert place.service.refusals == 1
    assert len(place.got(m.SpdzCorrection)) > dealt


def test_masks_leave_on_the_parties_word_and_not_on_the_servers() -> None:
    place = begun()
    place.tell(m.SpdzConfirm(session=COMMAND.session, step=2))  # the server lies
    assert place.got(m.SpdzMasks) == []
    word = checked(2)
    for name in NAMES[:2]:
        place.tell(word, sender=name)
    place.tell(word, sender=SERVER)
    assert place.got(m.SpdzMasks) == []
    place.tell(word, sender=NAMES[2])
    masks = place.got(m.SpdzMasks)
    assert [to for to, _ in masks] == [SERVER, SERVER]
    ((to, report),) = place.got(m.SpdzChecked)
    assert to == SERVER and isinstance(report, m.SpdzChecked)
    assert report.step == 2


@pytest.mark.parametrize("terms", [None, m.terms_of(open_command(dealer=DEALER))])
def test_no_mask_leaves_if_a_party_was_told_of_other_receivers(terms: bytes | None) -> None:
    place = begun()
    for name in NAMES[:2]:
        place.tell(checked(2), sender=name)
    place.tell(msgspec.structs.replace(checked(2), terms=terms), sender=NAMES[2])
    assert place.got(m.SpdzMasks) == []
    assert place.service.sessions == 0
    aborts = place.got(m.SpdzAbort)
    assert {to for to, _ in aborts} == {*NAMES, SERVER}
    assert {message.code for _, message in aborts} == {"equivocation"}  # type: ignore[attr-defined]
    assert "agent-02 was told other terms of this session than midas, who deals" in aborts[0][1].reason  # type: ignore[attr-defined]


def test_more_than_was_dealt_can_not_have_been_checked() -> None:
    place = begun()
    for name in NAMES:
        place.tell(checked(6), sender=name)
    assert place.got(m.SpdzMasks) == []
    assert place.service.refusals == 3


@pytest.mark.parametrize(
    ("command", "roles", "text"),
    [
        (open_command(dealer=SERVER), ("dealer",), "midas is not the dealer of this session, or not by its roster"),
        (COMMAND, ("data",), "midas is not the dealer of this session, or not by its roster"),
        (
            open_command(dealer=DEALER, parties=(DEALER, "agent-00", "agent-01")),
            ("dealer",),
            "midas deals or orchestrates: it must not hold masked values",
        ),
        (
            open_command(dealer=DEALER, rows=(m.SpdzRows(owner=SERVER, rows=8),)),
            ("dealer",),
            "server deals or orchestrates: it must not hold masked values",
        ),
        (
            open_command(dealer=DEALER, state_from=DEALER),
            ("dealer",),
            "midas deals or orchestrates: it must not hold masked values",
        ),
        (
            open_command(dealer=DEALER, outputs=(m.SpdzOutput(name="model", receiver=DEALER),)),
            ("dealer",),
            "midas deals or orchestrates: it must not hold masked values",
        ),
        (
            open_command(
                dealer=DEALER,
                idle_s=60.0,
                rows=(),
                outputs=(),
                checkpoints=(),
                data=None,
                state_from=None,
                check_every=1,
            ),
            ("dealer",),
            "a stepwise session is dealt for by who says its steps",
        ),
        (msgspec.structs.replace(COMMAND, plan_id=bytes(32)), ("dealer",), "is not here; put it first"),
        (msgspec.structs.replace(COMMAND, circuit=bytes(32)), ("dealer",), "to another circuit than the server says"),
        (
            open_command(dealer=DEALER, state_from=None, first_step=4, resume=m.SpdzPoint(session=bytes(16), step=4)),
            ("dealer",),
            "this dealer holds no masks of run toy-1 after 4 steps of session 00000000000000000000000000000000",
        ),
    ],
)
def test_refused_by_name(command: m.SpdzOpen, roles: tuple[str, ...], text: str) -> None:
    place = Place(roster=known(*roles))
    place.tell(command)
    assert text in place.refusal().reason
    assert place.service.sessions == 0


def test_only_the_server_commands_and_only_members_end_a_session() -> None:
    place = begun()
    place.tell(m.PlanPut(plan=TRAIN_PLAN), sender="agent-00")
    place.tell(COMMAND, sender="agent-00")
    place.tell(m.SpdzClose(session=COMMAND.session), sender="agent-00")
    place.tell(m.SpdzAbort(session=COMMAND.session, code="x", reason=""), sender="hub")
    assert place.service.sessions == 1
    assert place.got(m.Refused) == []
    place.tell(m.SpdzAbort(session=COMMAND.session, code="x", reason=""), sender="agent-00")
    assert place.service.sessions == 0


def test_a_server_that_restarts_has_forgotten_its_sessions() -> None:
    place = begun()
    place.service.on_presence(SERVER, True, 1)
    place.service.on_presence(SERVER, True, 2)
    assert place.service.sessions == 0


def test_it_deals_until_the_next_report_and_not_in_one_go() -> None:
    command = open_command(dealer=DEALER, steps=40, ahead=8, checkpoints=(40,), outputs=())
    place = Place()
    place.tell(command)
    found = []
    for done in (0, 2, 4, 6):
        confirm = m.SpdzConfirm(session=command.session, step=done)
        packet = Packet(sender=SERVER, to=DEALER, message=confirm, correlation=bytes(16), context=b"")
        place.service.on_message(packet)
        counts = []
        for _ in range(8):
            place.loop.advance(0.05)
            counts.append(len(place.got(m.SpdzCorrection)))
        found.append(counts)
        place.sent.clear()
        for name in NAMES:
            word = checked(done + 2, command)
            packet = Packet(sender=name, to=DEALER, message=word, correlation=bytes(16), context=b"")
            place.service.on_message(packet)
    assert found == [[8] * 8, [2] * 8, [1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 2]]

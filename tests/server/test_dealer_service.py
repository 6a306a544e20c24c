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


def test_masks_leave_on_the_parties_word_and_not_on_the_servers() -> None:
    place = begun()
    place.tell(m.SpdzConfirm(session=COMMAND.session, step=2))  # the server lies
    assert place.got(m.SpdzMasks) == []
    word = m.SpdzChecked(session=COMMAND.session, step=2, checkpoint=0, outputs=())
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


def test_more_than_was_dealt_can_not_have_been_checked() -> None:
    place = begun()
    for name in NAMES:
        place.tell(m.SpdzChecked(session=COMMAND.session, step=6, checkpoint=0, outputs=()), sender=name)
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

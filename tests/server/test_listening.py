"""Hearing what is said unasked: order, bounds, who is gone."""

from __future__ import annotations

import math

from sordino_common import messages as m
from sordino_server.listening import Ear
from sordino_server.rounds.effects import Gone, Said

WORD = m.SpdzClose(session=bytes(16))


def ear(*names: str, online: dict[str, int] | None = None) -> Ear:
    made = Ear(gone_s=5.0)
    made.listen(frozenset(names), online if online is not None else dict.fromkeys(names, 1), 0.0)
    return made


def test_what_is_said_is_kept_in_order_and_taken_once() -> None:
    heard = ear("ada", "bob")
    for name in ("bob", "ada", "eve"):
        heard.said(name, WORD)
    assert [item.name for item in heard.take().items] == ["bob", "ada"]
    assert not heard


def test_one_that_talks_too_much_does_not_take_the_room_of_others() -> None:
    heard = ear("ada", "bob")
    kept = [heard.said("ada", WORD) for _ in range(10_000)]
    assert kept == [True] * 64 + [False] * 9_936
    assert heard.said("bob", WORD) and not heard.said("eve", WORD)
    assert [item.name for item in heard.take().items] == ["ada"] * 64 + ["bob"]
    assert heard.said("ada", WORD), "what was taken makes room"
    heard.listen(frozenset({"ada"}), {"ada": 1}, 1.0)
    assert [heard.said("ada", WORD) for _ in range(64)] == [True] * 63 + [False]


def test_who_is_offline_for_long_is_gone_and_who_flaps_is_not() -> None:
    heard = ear("ada", "bob")
    heard.presence("ada", False, 1, 10.0)
    assert heard.review(14.0) == 15.0
    heard.presence("ada", True, 1, 14.5)
    assert heard.review(20.0) == math.inf
    heard.presence("bob", False, 1, 20.0)
    heard.reconnected(24.0)  # the server itself was away
    assert heard.review(25.0) == 29.0
    heard.review(29.0)
    assert heard.take().items == (Gone(name="bob", why="went offline"),)


def test_who_restarts_is_gone_at_once() -> None:
    heard = ear("ada")
    heard.presence("ada", True, 2, 1.0)
    assert heard.take().items == (Gone(name="ada", why="restarted"),)


def test_who_was_not_there_to_begin_with_gets_its_time() -> None:
    heard = ear("ada", online={})
    assert heard.review(0.0) == 5.0


def test_what_others_said_is_forgotten_when_listening_turns() -> None:
    heard = ear("ada", "bob")
    heard.said("ada", WORD)
    heard.said("bob", WORD)
    heard.listen(frozenset({"bob"}), {"bob": 1}, 1.0)
    assert heard.take().items == (Said(name="bob", message=WORD),)
    heard.listen(frozenset(), {}, 2.0)
    heard.said("bob", WORD)
    assert not heard


def test_what_is_kept_is_bounded() -> None:
    names = [f"n{index}" for index in range(100)]
    heard = ear(*names)
    for name in names * 50:
        heard.said(name, WORD)
    assert len(heard.take().items) == 4096

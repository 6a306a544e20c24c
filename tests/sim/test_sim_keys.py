"""Simulation keys and the mortal loop."""

from sordino_common.clock import VirtualLoop
from sordino_sim.keys import simulation_device_key, simulation_operator_key, simulation_random
from sordino_sim.mortal import MortalLoop


def test_keys_follow_from_seed_and_name() -> None:
    again = [simulation_device_key(7, "agent-00").public for _ in range(2)]
    assert again[0] == again[1]
    others = [simulation_device_key(8, "agent-00").public, simulation_device_key(7, "agent-01").public]
    assert again[0] not in others and others[0] != others[1]
    assert simulation_operator_key(7).public == simulation_operator_key(7).public != simulation_operator_key(8).public
    assert again[0].fingerprint == "4265-05f5-de8d-a45c-062c-0589-0574-1ca9", "golden: the same in every process"


def test_random_bytes_follow_from_seed_name_and_boot() -> None:
    first = simulation_random(1, "a", 1)(16)
    assert simulation_random(1, "a", 1)(16) == first
    assert first not in (simulation_random(1, "a", 2)(16), simulation_random(2, "a", 1)(16))


def test_the_dead_do_nothing_more() -> None:
    loop = VirtualLoop()
    mortal = MortalLoop(loop)
    ran: list[str] = []
    mortal.call_at(1.0, lambda: ran.append("before"))
    mortal.call_at(3.0, lambda: ran.append("after"))
    loop.call_at(3.0, lambda: ran.append("another device"))
    loop.advance(2.0)
    mortal.kill()
    mortal.call_at(2.5, lambda: ran.append("posthumous")).cancel()
    loop.advance(2.0)
    assert ran == ["before", "another device"]
    assert mortal.now_s() == loop.now_s() and mortal.wall_s() == loop.wall_s()

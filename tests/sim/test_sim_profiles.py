import pytest

from sordino_common.errors import ConfigError
from sordino_sim.profiles import DEFAULT_PROFILE, PROFILES, profile


def test_faster_boards_take_less_time() -> None:
    names = ["pi-zero2", "pi3", "pi4", "pi5", "server"]
    assert set(names) == set(PROFILES) and DEFAULT_PROFILE in PROFILES
    times = [profile(name).plan_seconds(flops=10**7, nodes=40, runs=20) for name in names]
    assert times == sorted(times, reverse=True)


def test_time_is_task_plus_runs_times_nodes_and_flops() -> None:
    pi4 = profile("pi4")
    expected = pi4.task_s + 3 * (10 * pi4.node_s + 6e6 / (pi4.gflops * 1e9))
    assert pi4.plan_seconds(flops=6_000_000, nodes=10, runs=3) == pytest.approx(expected)
    assert pi4.plan_seconds(flops=6_000_000, nodes=10, runs=3, slowdown=7) == pytest.approx(7 * expected)


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="pi-zero2, pi3, pi4, pi5, server"):
        profile("pi9")

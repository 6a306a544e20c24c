"""Fault files: what is taken, what is refused and where, and that draws are reproducible."""

from pathlib import Path

import pytest

from sordino_common.errors import ConfigError
from sordino_sim.faults import FaultSchedule, TransportName, load_faults

AGENTS = [f"agent-{index:02d}" for index in range(10)]


def load(tmp_path: Path, text: str, seed: int = 1, transport: TransportName = "memory") -> FaultSchedule:
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    return load_faults(path, agents=AGENTS, seed=seed, transport=transport)


def test_by_round_and_by_time(tmp_path: Path) -> None:
    schedule = load(
        tmp_path,
        """
faults:
  - {round: 3, do: die, agents: 3}
  - {round: 3, do: slow, agents: [agent-09], factor: 4}
  - {time_s: 12.5, do: broker-restart, down_s: 2}
  - {time_s: 2, do: leave, agents: [agent-01]}
  - {round: 5, do: return, agents: 2}
""",
    )
    assert [planned.fault.do for planned in schedule.timed] == ["leave", "broker-restart"]
    assert schedule.take_round(1) == []
    died, slowed = schedule.take_round(3)
    assert len(died.agents) == 3 and set(died.agents) <= set(AGENTS)
    assert died.describe() == f"{', '.join(died.agents)} died"
    assert slowed.describe() == "agent-09 slowed down by a factor of 4"
    assert schedule.take_round(3) == [], "a round's faults come once"
    (returned,) = schedule.take_round(5)
    assert (returned.count, returned.agents) == (2, ())
    assert schedule.pending_rounds == ()


def test_draws_are_fresh_agents_and_reproducible(tmp_path: Path) -> None:
    text = "faults: [{round: 1, do: die, agents: 4}, {round: 2, do: die, agents: 4}]"

    def drawn(seed: int) -> list[tuple[str, ...]]:
        schedule = load(tmp_path, text, seed)
        return [schedule.take_round(1)[0].agents, schedule.take_round(2)[0].agents]

    first, second = drawn(1)
    assert not set(first) & set(second)
    assert drawn(1) == [first, second] != drawn(2)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("faults:\n  - {do: die, agents: 1}", ":2:5:", "exactly one of `round` and `time_s`"),
        ("faults:\n  - {do: die, round: 1, time_s: 1, agents: 1}", ":2:5:", "exactly one"),
        ("faults:\n  - {do: die, round: 1}", ":2:5:", "needs `agents`"),
        ("faults:\n  - {do: die, round: 1, agents: 11}", ":2:25:", "the job has 10"),
        ("faults:\n  - {do: die, round: 1, agents: [agent-77]}", ":2:25:", "no agent 'agent-77'"),
        ("faults:\n  - {do: die, round: 1, agents: [agent-07, agent-07]}", ":2:25:", "twice"),
        ("faults:\n  - {do: server-kill, round: 1, agents: 1}", ":2:33:", "concerns no agents"),
        ("faults:\n  - {do: explode, round: 1}", ":2:6:", "explode"),
        ("faults:\n  - {do: die, round: 1, agents: 1, color: red}", ":2:", "color"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(tmp_path: Path, text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "faults.yaml" + where in str(caught.value) and what in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "transport", "what"),
    [
        ("do: slow, agents: 1", "processes", "`do: slow` needs --transport memory or mqtt, not processes: processes"),
        ("do: cut, agents: 1", "mqtt", "`do: cut` needs --transport memory, not mqtt: only there is the network"),
        ("do: cut, agents: 1", "processes", "`do: cut` needs --transport memory, not processes"),
        ("do: server-kill", "processes", "`do: server-kill` needs --transport memory or mqtt, not processes"),
    ],
)
def test_what_the_transport_does_not_simulate_is_refused_before_anything_runs(
    tmp_path: Path, fault: str, transport: TransportName, what: str
) -> None:
    text = f"faults:\n  - {{round: 2, do: die, agents: 1}}\n  - {{round: 9, {fault}}}"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, transport=transport)
    assert "faults.yaml:3:16: " in str(caught.value) and what in str(caught.value)
    assert load(tmp_path, text).pending_rounds == (2, 9)


def test_the_example_schedule_fits_the_example_job() -> None:
    schedule = load_faults(
        Path(__file__).parents[2] / "examples" / "faults-boston.yaml", agents=AGENTS, seed=1, transport="memory"
    )
    assert schedule.pending_rounds == (3, 5, 6, 7, 8, 9)

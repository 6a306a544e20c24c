"""From noised sums to parameters: exact on the grid, equal to torch's optimizers, and nothing else is moved."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest

from helpers_private import private_command
from helpers_sums import sum_terms
from sordino_common.errors import ConfigError, LocalError
from sordino_common.messages import Describe, Described, Message, RowQuery, SumNoise, SumStatistics
from sordino_server.rounds.effects import (
    Answers,
    Ask,
    Begin,
    Checkpoint,
    Effect,
    PrivateState,
    Result,
    Save,
    Scaling,
    Tell,
    ask,
    save,
    tell,
)
from sordino_server.rounds.events import RoundRecord
from sordino_server.rounds.private_steps import mean_gradient, moved, require_finite
from sordino_server.rounds.releases import Releases, release_of

RECORD = RoundRecord(
    round=1, loss=None, metrics={}, shares={}, steps=0, attempts=1, bytes_up=0, bytes_down=0, seconds=0.0
)


def test_a_gradient_is_the_sum_over_the_expected_sample() -> None:
    total = np.arange(-3, 4, dtype=np.int64) << 16
    weight, bias = mean_gradient(total, [(2, 3), ()], step=2.0**-16, rate=0.25, rows=40)
    np.testing.assert_array_equal(weight, np.array([[-0.3, -0.2, -0.1], [0.0, 0.1, 0.2]], np.float32))
    assert bias == np.float32(0.3) and weight.dtype == bias.dtype == np.float32


def test_an_update_is_the_mean_over_who_is_in_the_sum_and_frozen_tensors_stay() -> None:
    params = (np.ones((2, 2), np.float32), np.full(3, 5.0, np.float32))
    total = np.array([4, -4, 8, 0, 999, -999, 999], np.int64)
    first, second = moved(params, total, step=0.5, members=4, trainable=(True, False))
    np.testing.assert_array_equal(first, [[1.5, 0.5], [2.0, 1.0]])
    assert second is params[1], "what is in a frozen tensor's entries is noise"


def test_what_does_not_fit_is_refused() -> None:
    total = np.zeros(5, np.int64)
    with pytest.raises(LocalError, match="5 entries for tensors of 6"):
        mean_gradient(total, [(2, 3)], step=1.0, rate=0.5, rows=4)
    with pytest.raises(LocalError, match="0 rows at a sampling rate of"):
        mean_gradient(total, [(5,)], step=1.0, rate=0.5, rows=0)
    with pytest.raises(LocalError, match="nobody is in the sum"):
        moved((np.zeros(5, np.float32),), total, step=1.0, members=0, trainable=(True,))
    with pytest.raises(ConfigError, match="round 3: the parameters are not finite"):
        require_finite((np.array([np.inf], np.float32),), 3)


# --- counting ------------------------------------------------------------------------------------------------------


def release(number: int) -> Message:
    """A command of the release `number`."""
    return private_command(round=number)


def asking(*numbers: int) -> Ask:
    messages: dict[str, Message] = {f"agent-{k}": release(number) for k, number in enumerate(numbers)}
    return Ask(purpose="p", messages={**messages, "z": Describe()}, expects=Described, quorum=0, deadline_s=1.0,
               straggler_s=1.0)  # fmt: skip


def statistics(noise: SumNoise | None) -> Message:
    count = RowQuery(kind="count", columns=(), bits=0)
    return SumStatistics(terms=sum_terms(length=1, noise=noise), round=1, dataset="rows", columns=(), queries=(count,))


def test_what_a_release_is() -> None:
    assert release_of(release(3)) == b"3/0"
    noised = statistics(SumNoise(sigma_squared=4))
    assert isinstance(noised, SumStatistics) and release_of(noised) == noised.terms.session
    assert release_of(statistics(None)) is None, "exact sums are not counted: they have no epsilon"
    assert release_of(private_command(privacy=None)) is None
    assert release_of(Describe()) is None


def drive(rounds: Generator[Effect, Result, object], releases: Releases) -> tuple[list[Effect], object]:
    effects: list[Effect] = []
    counted = releases.counted(rounds)
    result: Result = None
    while True:
        try:
            effect = counted.send(result)
        except StopIteration as stop:
            return effects, stop.value
        effects.append(effect)
        result = Answers(replies={}, refusals={}, missing={}) if isinstance(effect, Ask) else None


def test_a_release_is_on_disk_before_its_first_command_leaves() -> None:
    releases = Releases(planned=5)
    state = Checkpoint(params=(), scaling=Scaling(), steps=0, record=RECORD)

    def rounds() -> Generator[Effect, Result, str]:
        yield from ask(asking(1, 1, 1))
        yield from tell("agent-0", Describe())
        yield from ask(asking(1))  # the same release, somebody late
        yield from tell("agent-1", release(2))
        yield from save(state)
        yield from ask(asking(3, 4))
        return "end"

    effects, value = drive(rounds(), releases)
    assert value == "end" and releases.begun == 4 and releases.left == 1
    kinds = [type(effect) for effect in effects]
    assert kinds == [Begin, Ask, Tell, Ask, Begin, Tell, Save, Begin, Begin, Ask]
    assert [effect.releases for effect in effects if isinstance(effect, Begin)] == [1, 2, 3, 4]
    (saved,) = (effect for effect in effects if isinstance(effect, Save))
    assert saved.checkpoint.private == PrivateState(begun=2)


def test_what_began_before_a_crash_still_counts() -> None:
    releases = Releases(planned=3, begun=3)

    def rounds() -> Generator[Effect, Result, None]:
        yield from ask(asking(7))

    effects, _ = drive(rounds(), releases)
    assert isinstance(effects[0], Begin) and effects[0].releases == 4
    assert releases.left == 0

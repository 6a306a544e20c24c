"""The law of run records and checkpoints, on SQLite and on PostgreSQL: exact round trips, one writer, damage is named.

What crashes leave behind is in test_store_crash.py."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers_postgres import Postgres
from sordino_common.errors import ConfigError
from sordino_server.rounds.effects import Checkpoint, PrivateState, Scaling
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.store import RunStore, export

NAMES = ("w", "b")


def checkpoint(number: int, *, value: float = 0.1) -> Checkpoint:
    record = RoundRecord(
        round=number,
        loss=1.0 / 3.0,
        metrics={"test_mse": 2.0 / 7.0},
        shares={
            "agent-0": Share(outcome="answered", rows=40, steps=3, loss=0.3, seconds=0.25),
            "agent-1": Share(outcome="missing", note="went offline"),
        },
        steps=3,
        attempts=1,
        bytes_up=1000,
        bytes_down=2000,
        seconds=1.5,
        test_rows=71,
    )
    params = (np.full((3, 2), value * number, np.float32).T, np.array(np.nan, np.float32))
    scaling = Scaling(offset=(0.1, 1e-300), scale=(3.0, 7.1), target_offset=22.5, target_scale=9.17)
    return Checkpoint(params=params, scaling=scaling, steps=3 * number, record=record)


class Records:
    """Run records of one kind: `records(folder)` opens those that belong to `folder`, again and again."""

    def __init__(self, new_url: Callable[[], str] | None) -> None:
        self._new_url = new_url
        self._urls: dict[Path, str] = {}

    def url(self, folder: Path) -> str | None:
        if self._new_url is not None and folder not in self._urls:
            self._urls[folder] = self._new_url()
        return self._urls.get(folder)

    def __call__(self, folder: Path) -> RunStore:
        return RunStore(folder, wall_s=lambda: 1_700_000_000.0, database=self.url(folder))


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest) -> Records:
    cluster: Postgres | None = request.getfixturevalue("postgres") if request.param == "postgres" else None
    return Records(None if cluster is None else cluster.url)


def created(store: RunStore, run: str = "toy-1") -> None:
    store.create(run, job="toy", mode="federated", job_path="/j.yaml", job_json="{}", model_sha256="00", names=NAMES)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        created(store)
        assert store.checkpoint("toy-1") is None
        for number in range(1, 6):
            store.save("toy-1", checkpoint(number), elapsed_s=2.0 * number)
    with opened(tmp_path) as store:
        back, expected = store.checkpoint("toy-1"), checkpoint(5)
        assert back is not None
        assert [p.tobytes() for p in back.params] == [p.tobytes() for p in expected.params]
        assert (back.scaling, back.steps, back.record) == (expected.scaling, expected.steps, expected.record)
        assert store.records("toy-1") == tuple(checkpoint(number).record for number in range(1, 6))
        assert store.elapsed_s("toy-1") == 10.0
    files = sorted(path.name for path in (tmp_path / "runs" / "toy-1").glob("round-*"))
    assert files == ["round-000004.safetensors", "round-000005.safetensors"]


def test_a_file_without_its_row_does_not_count(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        created(store)
        store.save("toy-1", checkpoint(1), elapsed_s=1.0)
        # As if the process had died between the file and the transaction, and in the middle of a file.
        home = tmp_path / "runs" / "toy-1"
        (home / "round-000002.safetensors").write_bytes((home / "round-000001.safetensors").read_bytes())
        (home / ".round-000003.safetensors.new").write_bytes(b"half")
        back = store.checkpoint("toy-1")
        assert back is not None
        assert back.record.round == 1
        store.save("toy-1", checkpoint(2), elapsed_s=2.0)
        again = store.checkpoint("toy-1")
        assert again is not None
        assert again.params[0][0, 0] == np.float32(0.2)


def test_damage_is_named(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        created(store)
        store.save("toy-1", checkpoint(1), elapsed_s=1.0)
        path = tmp_path / "runs" / "toy-1" / "round-000001.safetensors"
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ConfigError, match=r"round-000001.safetensors: damaged"):
            store.checkpoint("toy-1")
        path.unlink()
        with pytest.raises(ConfigError, match=r"can't be read: No such file"):
            store.checkpoint("toy-1")
        with pytest.raises(ConfigError, match=r"there is no run toy-2 .*latest: toy-1"):
            store.row("toy-2")
        with pytest.raises(ConfigError, match=r"already a run toy-1"):
            created(store)
        created(store, "toy-3")
        with pytest.raises(ConfigError, match=r"no finished round"):
            store.tensors("toy-3")
        with pytest.raises(ConfigError, match=r"there is no run toy-4"):
            store.tensors("toy-4")


def test_one_process_writes_a_run(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store, opened(tmp_path) as other:
        created(store)
        assert store.row("toy-1").status == "stopped"  # running by its record, but nobody holds it
        with store.hold("toy-1"):
            assert other.row("toy-1").status == "running"
            with pytest.raises(ConfigError, match=r"being trained by another process"), other.hold("toy-1"):
                pass
        with other.hold("toy-1"):
            pass
        store.finish("toy-1", "done", summary={"x": 1.5})
        assert (other.row("toy-1").status, other.row("toy-1").summary) == ("done", {"x": 1.5})


def test_who_lists_runs_at_that_moment_does_not_keep_one_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = [True, True]
    flock = fcntl.flock

    def busy(file: object, how: int) -> None:
        if how & fcntl.LOCK_EX and looking:
            looking.pop()
            raise BlockingIOError
        flock(file, how)  # type: ignore[arg-type]

    with RunStore(tmp_path, wall_s=lambda: 0.0) as store:
        created(store)
        monkeypatch.setattr(fcntl, "flock", busy)
        with store.hold("toy-1"):
            assert store.row("toy-1").status == "running"


def test_export_is_a_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    export(tensors, tmp_path / "m.safetensors", run="toy-1")
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(other.weight, model.weight)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "toy-1"}
    scaling = Scaling(offset=(1.0, 2.0, 3.0), scale=(0.1, 1.0, 7.0), target_offset=22.5, target_scale=9.25)
    export(tensors, tmp_path / "m.safetensors", run="toy-1", scaling=scaling)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        stated = json.loads(file.metadata()["scaling"])
    assert stated == {
        "offset": [1.0, 2.0, 3.0], "scale": [0.1, 1.0, 7.0], "target_offset": 22.5, "target_scale": 9.25,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"can't be written"):
        export(tensors, tmp_path / "no" / "m.safetensors", run="toy-1")


def test_an_optimizer_state_comes_back_with_the_releases_that_began_after_it(tmp_path: Path, opened: Records) -> None:
    states = (*(np.full((2, k + 1), k, np.float32) for k in range(12)), np.array(0.5, np.float32))
    with opened(tmp_path) as store:
        created(store)
        assert store.begun("toy-1") == 0
        store.begin("toy-1", 1)
        store.save("toy-1", replace(checkpoint(1), private=PrivateState(optimizer=states, begun=1)), elapsed_s=1.0)
        store.begin("toy-1", 2)
        store.begin("toy-1", 3)
    with opened(tmp_path) as store:  # the round of releases 2 and 3 was lost
        found = store.checkpoint("toy-1")
        assert found is not None and found.private is not None
        assert found.private.begun == store.begun("toy-1") == 3
        assert all(np.array_equal(a, b) for a, b in zip(found.private.optimizer, states, strict=True))
        store.begin("toy-1", 2)
        assert store.begun("toy-1") == 3, "what has begun does not become undone"
        for number in (2, 3, 4):
            store.save("toy-1", replace(checkpoint(number), private=found.private), elapsed_s=1.0)
    assert len(list((tmp_path / "runs" / "toy-1").glob("private-*.safetensors"))) == 2


def test_sums_are_numbered_by_run_and_releases_only_grow(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store, opened(tmp_path) as other:
        created(store)
        created(store, "toy-2")
        assert [store.next_sum("toy-1"), other.next_sum("toy-1"), store.next_sum("toy-2")] == [1, 2, 1]
        assert store.begun("toy-2") == 0
        store.begin("toy-2", 4)
        other.begin("toy-2", 3)
        assert (store.begun("toy-2"), store.begun("toy-1")) == (4, 0)
    with opened(tmp_path) as store:
        assert (store.next_sum("toy-1"), store.next_sum("toy-2")) == (3, 2)


def test_a_round_that_is_saved_again_replaces_the_first(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        created(store)
        store.save("toy-1", checkpoint(1), elapsed_s=1.0)
        again = replace(checkpoint(1), record=replace(checkpoint(1).record, loss=0.25, steps=9, bytes_up=1 << 40))
        store.save("toy-1", again, elapsed_s=2.0)
        assert store.records("toy-1") == (again.record,)
        assert store.elapsed_s("toy-1") == 2.0


def test_what_agents_say_and_losses_that_are_no_numbers_are_kept(tmp_path: Path, opened: Records) -> None:
    """A device chooses the text of its refusal: none may keep the server from saving a round."""
    words = "no \N{SNOWMAN} %s ? {x} '; DROP TABLE runs; --"
    shares = {
        "agent-0": Share(outcome="refused", note=words),
        "agent-1": Share(outcome="refused", note="a\0b"),
        "agent-2": Share(outcome="answered", rows=1, steps=1, loss=math.inf),
    }
    record = replace(checkpoint(1).record, loss=math.nan, shares=shares)
    with opened(tmp_path) as store:
        created(store)
        store.save("toy-1", replace(checkpoint(1), record=record), elapsed_s=1.0)
        (found,) = store.records("toy-1")
    assert found.loss is None
    assert found.shares["agent-0"].note == words
    assert found.shares["agent-1"].note in ("a\0b", "a\ufffdb"), "PostgreSQL's text has no NUL"
    assert found.shares["agent-2"].loss == math.inf


def test_runs_are_listed_by_age_then_by_name(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        for run in ("b-1", "a-1", "a-10", "a-2", "Z"):
            created(store, run)
        assert [row.run for row in store.runs()] == ["Z", "a-1", "a-10", "a-2", "b-1"]
        store.finish("a-2", "failed", error="agent-1: no")
        assert (store.row("a-2").status, store.row("a-2").error) == ("failed", "agent-1: no")


def test_an_outline_counts_what_the_records_hold(tmp_path: Path, opened: Records) -> None:
    with opened(tmp_path) as store:
        created(store)
        assert store.totals() == {"rounds": 0, "seconds": 0.0, "bytes_up": 0, "bytes_down": 0, "answers": {}}
        for number in (1, 2, 3):
            store.save("toy-1", checkpoint(number), elapsed_s=1.0)
        for after in (0, 2, 3):
            records, outline = store.records("toy-1", after=after), store.outline("toy-1", after=after)
            assert [replace(record, shares={}) for record in records] == list(outline.records)
            assert outline.rounds == {r.round: (len(r.shares) - r.dropouts, len(r.shares)) for r in records}
            told = [(name, share.outcome == "answered") for r in records for name, share in r.shares.items()]
            assert outline.agents == {
                name: (sum(good for who, good in told if who == name), sum(who == name for who, _ in told))
                for name, _ in told
            }
        totals = store.totals()
        assert (totals["rounds"], sum(totals["answers"].values())) == (
            3,
            sum(len(r.shares) for r in store.records("toy-1")),
        )

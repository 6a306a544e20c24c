"""Run records and checkpoints: exact round trips, crashes between the steps, one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

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


def opened(folder: Path) -> RunStore:
    return RunStore(folder, wall_s=lambda: 1_700_000_000.0)


def created(store: RunStore, run: str = "toy-1") -> None:
    store.create(run, job="toy", mode="federated", job_path="/j.yaml", job_json="{}", model_sha256="00", names=NAMES)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
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


def test_a_file_without_its_row_does_not_count(tmp_path: Path) -> None:
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


def test_damage_is_named(tmp_path: Path) -> None:
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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "runs.sqlite").write_bytes(b"this is no database, but it is long enough to be looked at" * 9)
    with pytest.raises(ConfigError, match=r"runs.sqlite: the run records can't be used"):
        opened(tmp_path / "other")


def test_one_process_writes_a_run(tmp_path: Path) -> None:
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


def test_kill_9_in_mid_save_leaves_the_last_round_whole(tmp_path: Path) -> None:
    """A child saves rounds as fast as it can and is killed; what is found afterwards is one whole round."""
    script = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        import numpy as np
        from sordino_server.store import RunStore
        from sordino_server.rounds.effects import Checkpoint, Scaling
        from sordino_server.rounds.events import RoundRecord
        store = RunStore(Path({str(tmp_path)!r}), wall_s=time.time)
        store.create("r", job="toy", mode="federated", job_path="", job_json="", model_sha256="", names=("w",))
        with store.hold("r"):
            for number in range(1, 100000):
                record = RoundRecord(round=number, loss=0.0, metrics={{}}, shares={{}}, steps=1, attempts=1,
                                     bytes_up=0, bytes_down=0, seconds=0.0)
                params = (np.full(50_000, number, np.float32),)
                store.save("r", Checkpoint(params=params, scaling=Scaling(), steps=number, record=record), elapsed_s=0)
                print(number, flush=True)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = 0
    for line in child.stdout:
        said = int(line)
        if said == 12:
            os.kill(child.pid, signal.SIGKILL)
            break
    rest = [int(line) for line in child.stdout if line.strip().isdigit()]
    child.stdout.close()
    child.wait()
    with opened(tmp_path) as store, store.hold("r"):
        back = store.checkpoint("r")
        assert back is not None
        assert back.record.round >= max([said, *rest])
        assert (back.params[0] == back.record.round).all()


def test_an_optimizer_state_comes_back_with_the_releases_that_began_after_it(tmp_path: Path) -> None:
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

"""What a viewer sees: the live file of a run, births heard by a listener, all of it in one View, and `sordino top`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from helpers_mosquitto import Mosquitto
from helpers_server import PROGRAMS, Agent, Fleet, job_spec
from helpers_view import HOSTILE, NOW_S, hostile, run_view, save, store_with_runs, view
from sordino_common import messages as m
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.presence import make_birth, make_death
from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.clock import VirtualLoop
from sordino_common.transport.memory import MemoryBroker, MemoryTransport
from sordino_common.transport.mqtt import MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor
from sordino_common.transport.topics import status_topic
from sordino_server.cli import app, run_cli
from sordino_server.dashboard.births import Births
from sordino_server.dashboard.live import Live, Spending, live_path, read_live, write_live
from sordino_server.dashboard.publisher import Publisher
from sordino_server.dashboard.source import Source
from sordino_server.dashboard.terminal import frame
from sordino_server.home import EnrolmentRequest, create_home
from sordino_server.rounds.events import Note, RunStarted
from sordino_server.rounds.fedavg import federated_averaging

RUN = "toy-1"


def publisher(fleet: Fleet, folder: Path, *, privacy: object = None) -> Publisher:
    made = Publisher(
        folder, RUN, dataset="toy", conductor=fleet.conductor, loop=fleet.loop, privacy=lambda: privacy  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    fleet.conductor.observer = made
    made(RunStarted(run=RUN, job="toy", mode="federated", security="plain", rounds=4, first_round=1, members=()))
    return made


def begin(fleet: Fleet) -> None:
    generator = federated_averaging(
        job_spec(), run=RUN, programs=PROGRAMS, params=(np.zeros(2, np.float32),), resumed=None
    )
    fleet.conductor.start(generator, save=lambda _: None)


def live(folder: Path) -> Live:
    found = read_live(live_path(folder, RUN))
    assert found is not None
    return found


def test_the_live_file_says_who_is_awaited_and_how_it_ended(tmp_path: Path) -> None:
    mute = Agent("mute", mute=(m.Train,))
    fleet = Fleet([Agent("ada"), Agent("bob", online=False), Agent("cy"), mute])
    told = publisher(fleet, tmp_path)
    begin(fleet)
    fleet.loop.advance(9.0)  # the others have answered, and the quorum waits for stragglers
    now = live(tmp_path)
    assert now.wait is not None and now.wait.names == ("mute",) and now.connected
    assert {agent.name: agent.state for agent in now.agents} == {
        "ada": "answered", "bob": "offline", "cy": "answered", "mute": "awaited"
    }  # fmt: skip
    assert now.wait.since_s < now.updated_s < now.wait.deadline_s
    assert live_path(tmp_path, RUN).stat().st_mode & 0o777 == 0o600
    fleet.die("ada")
    fleet.loop.advance(1.0)
    now = live(tmp_path)
    assert now.notices[-1].text == "ada is offline" and now.bytes_up > 0
    told(Note(text="careful", level="warning"))
    told.close("failed", "no quorum: mute did not answer")
    now = live(tmp_path)
    assert (now.state, now.error, now.wait, now.warnings) == ("failed", "no quorum: mute did not answer", None, 1)
    before = live_path(tmp_path, RUN).read_bytes()
    fleet.come_back("ada")
    fleet.loop.advance(30.0)
    assert live_path(tmp_path, RUN).read_bytes() == before  # the run is over


def test_helpers_and_compute_agents_are_seen_too(tmp_path: Path) -> None:
    fleet = Fleet([Agent("ada")])
    fleet.conductor.attach(fleet, members=lambda: ("ada",), traffic=lambda: (0, 0), others=lambda: ("zoe", "helga"))
    fleet.conductor.on_presence("helga", True, 1)
    publisher(fleet, tmp_path)
    assert [(agent.name, agent.state) for agent in live(tmp_path).agents] == [
        ("ada", "idle"), ("helga", "idle"), ("zoe", "offline")
    ]  # fmt: skip


def test_a_quiet_run_is_written_every_few_seconds_and_a_busy_one_not_more(tmp_path: Path) -> None:
    fleet = Fleet([Agent(f"a{k}", delay_s=0.001 * k) for k in range(40)])
    told = publisher(fleet, tmp_path)
    begin(fleet)
    seen = set()
    for _ in range(100):
        fleet.loop.advance(0.02)
        seen.add(live(tmp_path).updated_s)
    assert len(seen) <= 5  # in 2 s
    fleet.conductor.interrupt("enough")
    for _ in range(60):
        fleet.loop.advance(1.0)
        assert fleet.loop.wall_s() - live(tmp_path).updated_s <= 5.0
    told.close("interrupted")


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    fleet = Fleet([Agent("a"), Agent("b")])
    publisher(fleet, tmp_path)
    begin(fleet)
    fleet.finish()
    assert [r.getMessage() for r in caplog.records] == ["event=live-not-written run=toy-1 reason='Not a directory'"]


def test_what_is_spent_is_asked_once_a_release(tmp_path: Path) -> None:
    asked = []

    def privacy() -> dict[str, object]:
        asked.append(1)
        one = {"unit": "record", "epsilon": 0.25 * len(asked), "delta": 1e-5, "releases": len(asked)}
        return {**one, "device": {**one, "unit": "device"}}

    fleet = Fleet([Agent("a")])
    told = Publisher(tmp_path, RUN, dataset="toy", conductor=fleet.conductor, loop=fleet.loop, privacy=privacy)
    told(RunStarted(run=RUN, job="toy", mode="federated", security="x", rounds=4, first_round=1, members=()))
    told.spend()
    fleet.loop.advance(30.0)
    now = live(tmp_path)
    assert [(one.unit, one.epsilon, one.releases) for one in now.spent] == [("record", 0.5, 2), ("device", 0.5, 2)]
    assert len(asked) == 2


def test_a_live_file_of_another_version_is_none(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    assert read_live(path) is None
    for text in ("", "{}", '{"format": 2}', "[1]", "\x00"):
        path.write_text(text)
        assert read_live(path) is None


# --- births --------------------------------------------------------------------------------------------------------


def test_births_are_verified_and_a_newer_roster_lets_in_and_leaves_out() -> None:
    loop = VirtualLoop()
    broker = MemoryBroker(loop)
    keys = {name: DeviceKey.generate() for name in ("ada", "bob", "eve", "server")}
    entries = {
        name: RosterEntry(name=name, sign_key=key.public.sign_key, box_key=key.public.box_key,
                          roles=("server",) if name == "server" else ("data",))
        for name, key in keys.items()
    }  # fmt: skip

    def roster(epoch: int, *names: str) -> Roster:
        chosen = tuple(entries[name] for name in sorted((*names, "server")))
        return Roster(fleet="lab", epoch=epoch, issued_s=1, expires_s=2_000_000_000, entries=chosen)

    newest = [roster(1, "ada")]
    births = Births(MemoryTransport(broker, loop, "view"), loop, fleet="lab", server="server", roster=lambda: newest[0])
    sender = MemoryTransport(broker, loop, "devices")

    class Silent:
        def on_connected(self) -> None: ...
        def on_disconnected(self, reason: str) -> None: ...
        def on_packet(self, topic: str, payload: bytes, retained: bool) -> None: ...
        def on_writable(self) -> None: ...

    sender.open(Silent())
    loop.advance(5.0)

    def say(packet: bytes, topic: str) -> None:
        assert sender.publish(topic, packet, retain=True)
        loop.advance(1.0)

    def birth(name: str, by: str | None = None) -> bytes:
        return make_birth(keys[by or name], fleet="lab", name=name, boot=1, connection=1, version="0.1.0", epoch=1)

    say(birth("ada"), status_topic("lab", "ada"))
    say(birth("bob"), status_topic("lab", "bob"))
    births.open()
    loop.advance(5.0)
    assert births.heard and births.state == "connected"
    assert births.online == {"ada": "0.1.0"} and births.refused == 1
    newest[0] = roster(2, "ada", "bob")
    loop.advance(11.0)
    assert set(births.online) == {"ada", "bob"}
    # Forged, misplaced, malformed: refused and counted, nothing changes.
    for packet, topic in (
        (birth("ada", by="eve"), status_topic("lab", "ada")),
        (birth("bob"), status_topic("lab", "ada")),
        (b"\xff" * 5000, status_topic("lab", "eve")),
        (birth("eve"), status_topic("lab", "eve")),
    ):
        say(packet, topic)
    assert set(births.online) == {"ada", "bob"} and births.refused == 5
    say(make_death(keys["bob"], fleet="lab", name="bob", boot=1, connection=1), status_topic("lab", "bob"))
    assert set(births.online) == {"ada"}
    newest[0] = roster(3, "bob")
    loop.advance(11.0)
    assert births.online == {}
    broker.stop()
    loop.advance(1.0)
    assert not births.heard and births.state.startswith("the broker is away")
    assert "view" not in broker.clients
    births.close()


# --- source --------------------------------------------------------------------------------------------------------


def test_a_view_joins_records_and_live_files(tmp_path: Path) -> None:
    with ExitStack() as stack, store_with_runs(tmp_path) as store, store.hold("r-3"):
        one = {"unit": "record", "epsilon": 0.5, "delta": 1e-5, "releases": 9}
        store.finish("r-1", "done", summary={"privacy": {**one, "device": None}})
        store.begin("r-2", 4)
        store.finish("r-2", "failed", error="no quorum: ada")
        store.begin("r-3", 1)
        source = stack.enter_context(Source(tmp_path, version="0.1.0", wall_s=lambda: NOW_S))
        save(store, "r-3", 1, "ada", "bob")
        first = source.view()
        assert first.datasets[0].uncounted == 2  # r-2 and r-3 have released something, nobody has said what it cost
        now = Live(
            run="r-3", job="toy", mode="federated", security="plain", dataset="ward", pid=1, state="running",
            started_s=NOW_S - 9, updated_s=NOW_S - 1, rounds=9, round=2, attempt=0, connected=True, agents=(),
            wait=None, bytes_up=999, bytes_down=5, warnings=0, notices=(),
            spent=(Spending(unit="record", epsilon=0.1, delta=1e-5, releases=1),),
        )  # fmt: skip
        write_live(live_path(tmp_path, "r-3"), now)
        save(store, "r-3", 2, "ada")
        whole = source.view()
        run = whole.now
        assert run is not None and (run.run, run.status, run.round, run.rounds) == ("r-3", "running", 2, 9)
        assert [(p.round, p.answered, p.asked) for p in run.points] == [(1, 2, 3), (2, 1, 2)]
        assert (run.bytes_up, run.bytes_down, run.metrics) == (999, 40, {"test_mse": 3.0})
        assert {agent.name: (agent.answered, agent.asked) for agent in whole.agents} == {
            "ada": (2, 2), "bob": (1, 1), "gone": (0, 2)
        }  # fmt: skip
        (spent,) = whole.datasets
        assert (spent.dataset, spent.runs, spent.releases, spent.uncounted) == ("ward", 2, 10, 1)
        assert spent.epsilon == pytest.approx(0.6) and spent.delta == pytest.approx(2e-5)
        assert whole.runs_by_status == {"done": 1, "failed": 1, "running": 1}
        assert [notice.text for notice in whole.notices] == ["run r-2 failed: no quorum: ada"]
        assert run.silent_s is None
        save(store, "r-3", 3, "ada", "bob")
        again = source.view()
        assert again.now is not None and [p.asked for p in again.now.points] == [3, 2, 3]
        assert {a.name: (a.answered, a.asked) for a in again.agents}["gone"] == (0, 3)
        write_live(live_path(tmp_path, "r-3"), msgspec.structs.replace(now, updated_s=NOW_S - 100))
        assert source.view().now.silent_s == 100.0  # type: ignore[union-attr]


def test_looking_never_keeps_a_run_from_going_on(tmp_path: Path) -> None:
    """A viewer may have the lock's shared half for a moment, at the very moment in which a run begins."""
    with store_with_runs(tmp_path) as store:
        import fcntl
        import threading

        home = tmp_path / "runs" / "r-1"
        home.mkdir(parents=True)
        peek = (home / "lock").open("w")
        fcntl.flock(peek, fcntl.LOCK_SH)
        threading.Timer(0.05, peek.close).start()
        with store.hold("r-1"), Source(tmp_path, version="1") as source:
            assert source.view().runs_by_status == {"running": 1, "stopped": 2}


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(app, ["top", "--once", "--fleet", str(tmp_path)], program="sordino") == 2
    assert "no fleet.yaml in it; make a fleet with: sordino init" in capsys.readouterr().err


# --- top -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [0, 1, 10, 200])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 16), (200, 60)])
def test_a_frame_fits_and_shows_trouble_first(agents: int, width: int, height: int) -> None:
    lines = frame(view(agents), width=width, height=height)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    text = "\n".join(line.plain for line in lines)
    for words in ("sordino lab", "round 13/30", "loss 0.1667", "epsilon 0.9300"):
        assert words in text, words
    assert "7 here" in text if agents == 10 else True
    if agents >= 10:
        rows = [line.plain.split() for line in lines if line.plain.startswith("agent-0")]
        assert [row[1] for row in rows[:3]] == ["refused", "offline", "awaited"]
        assert "policy: this Plan" in text or width == 60
    if agents == 200:
        assert "more: " in text


def test_no_state_is_told_by_colour_alone_and_nothing_moves_the_cursor() -> None:
    console = Console(no_color=True, width=80, height=24, force_terminal=False)
    with console.capture() as caught:
        for line in frame(hostile(), width=80, height=24):
            console.print(line, no_wrap=True)
    out = caught.get()
    assert "\x1b" not in out and "alert" in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("status", ["failed", "stopped", "interrupted", "comparing", "done"])
def test_runs_that_are_not_in_rounds(status: str) -> None:
    error = "quorum missed: 3 of 5; missing agent-001" if status == "failed" else ""
    text = "\n".join(line.plain for line in frame(view(runs=(run_view(status, error=error),)), width=80, height=24))
    assert status in text and error in text
    text = "\n".join(line.plain for line in frame(view(runs=()), width=80, height=24))
    assert "no run yet" in text
    silent = run_view("running", silent_s=95.0)
    assert "NO NEWS for 2 min" in "\n".join(line.plain for line in frame(view(runs=(silent,)), width=80, height=24))


def test_top_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with store_with_runs(tmp_path) as store:
        save(store, "r-1", 1, "ada")
    assert run_cli(app, ["top", "--json", "--fleet", str(tmp_path)], program="sordino") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["runs_by_status"] == {"stopped": 3} and len(value["runs"]) == 3
    assert run_cli(app, ["top", "--once", "--fleet", str(tmp_path)], program="sordino") == 0
    assert "stopped" in capsys.readouterr().out
    assert run_cli(app, ["top", "--fleet", str(tmp_path)], program="sordino") == 2
    assert "one frame for a script: --once" in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_what_it_has(tmp_path: Path) -> None:
    store_with_runs(tmp_path).close()
    command = [sys.executable, "-m", "sordino_server.cli", "top", "--once", "--fleet", str(tmp_path)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
    done = subprocess.run(command, capture_output=True, env=env, check=True)
    assert b"stop" in done.stdout and max(map(len, done.stdout.splitlines())) <= 20


def test_top_on_a_terminal_ends_with_q(tmp_path: Path) -> None:
    import pty

    store_with_runs(tmp_path).close()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sordino_server.cli", "top", "--fleet", str(tmp_path), "--interval", "0.2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env)
    os.close(theirs)
    seen = b""
    deadline_s = time.monotonic() + 60.0
    while b"stopped" not in seen and time.monotonic() < deadline_s:
        seen += os.read(ours, 4096)
    os.write(ours, b"q")
    while True:  # so that it can write its farewell
        try:
            if not os.read(ours, 4096):
                break
        except OSError:
            break
    _, errors = process.communicate(timeout=30.0)
    os.close(ours)
    assert (process.returncode, errors) == (0, b"")
    assert HOSTILE.encode() not in seen


@pytest.mark.mqtt
def test_a_listener_at_a_real_broker_sees_who_is_there(
    tmp_path: Path, start_mosquitto: Callable[..., Mosquitto], capsys: pytest.CaptureFixture[str]
) -> None:
    broker = start_mosquitto()
    home = create_home(tmp_path / "lab", fleet="lab", server="server", broker=f"127.0.0.1:{broker.port}")
    key = DeviceKey.generate()
    home.add(
        EnrolmentRequest(name="ada", sign_key=key.public.sign_key.hex(), box_key=key.public.box_key.hex()),
        roles=(),
        zone=None,
    )
    home.sign(now_s=time.time())
    with Reactor() as reactor:

        class Device:
            here = False

            def on_connected(self) -> None:
                birth = make_birth(key, fleet="lab", name="ada", boot=1, connection=1, version="0.1.0", epoch=1)
                self.here = device.publish(status_topic("lab", "ada"), birth, retain=True)

            def on_disconnected(self, reason: str) -> None: ...
            def on_packet(self, topic: str, payload: bytes, retained: bool) -> None: ...
            def on_writable(self) -> None: ...

        handler = Device()
        device = MqttTransport(MqttSettings(host="127.0.0.1", port=broker.port, client_id="ada"), reactor)
        device.open(handler)
        assert reactor.run_until(lambda: handler.here, deadline_s=reactor.now_s() + 20.0)
        device.close()
    with home.occupied():  # as a training would: the listener is nobody's rival
        arguments = ["top", "--json", "--connect", "--fleet", str(home.folder)]
        assert run_cli(app, arguments, program="sordino") == 0
    (agent,) = json.loads(capsys.readouterr().out)["agents"]
    assert (agent["name"], agent["state"], agent["version"]) == ("ada", "online", "0.1.0")
    broker.stop()
    assert run_cli(app, arguments, program="sordino") == 3  # the view is there, what was asked for is not
    caught = capsys.readouterr()
    assert json.loads(caught.out)["agents"][0]["state"] == "unknown"
    assert "births were asked for (--connect), but the broker is away" in caught.err

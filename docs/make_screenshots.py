"""Makes docs/images/*.png again: the dashboard in mid-round, and the report, both of a real `sordino-sim` run.

    .venv/bin/python docs/make_screenshots.py         needs chromium (scripts/setup-test)

The run is simulated on its virtual clock, so every figure is the same each time; at the moment that is shown the clock
stands still while a browser looks at the real server.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from sordino_server.dashboard.live import Live, live_path, read_live
from sordino_server.dashboard.metrics import exposition
from sordino_server.dashboard.source import Source
from sordino_server.dashboard.web import Dashboard
from sordino_server.job import load_job
from sordino_server.report import write_report
from sordino_server.rounds.events import Event, RunStarted
from sordino_sim.runner import simulate

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SETTINGS = (
    "simulation.agents=120",
    "secure_aggregation.minimum=60",
    "train.rounds=16",
    "train.evaluate_every=1",
    "simulation.profile='pi4:60,pi3:30,pi-zero2:30'",
    "privacy.epsilon=8",
)
ROUND = 5


def main() -> int:
    logging.getLogger("sordino").setLevel(logging.ERROR)
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.stderr.write("make_screenshots: no chromium; as root: scripts/setup-test\n")
        return 2
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "wards"
        camera = _Camera(program, Path(scratch) / "profile")
        moment = _Moment(folder, lambda: _shoot(camera, folder))
        done = simulate(
            load_job(ROOT / "examples" / "fleet-device-dp.yaml", overrides=SETTINGS),
            observer=moment,
            store_folder=folder,
        )
        if not moment.came:
            sys.stderr.write(f"make_screenshots: nobody was awaited in round {ROUND}; name another ROUND\n")
            return 1
        write_report(done.result, Path(scratch) / "report")
        camera.take(f"file://{scratch}/report/report.html", IMAGES / "report.png", 1060, 1500)
    return 0


class _Camera:
    def __init__(self, program: str, profile: Path) -> None:
        self._command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        self._command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        self._command += ["--no-sandbox"] if os.geteuid() == 0 else []

    def take(self, url: str, path: Path, width: int, height: int, *, dark: bool = False) -> None:
        size = [f"--window-size={width},{height}", f"--screenshot={path}"]
        colours = ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([*self._command, *size, *colours, url], check=True, capture_output=True, timeout=120)
        sys.stderr.write(f"{path.relative_to(ROOT)}\n")


class _Moment:
    """An observer that acts once: in round `ROUND`, while some agents have answered and some are awaited."""

    def __init__(self, folder: Path, act: Callable[[], None]) -> None:
        self._folder = folder
        self._act = act
        self._run = ""
        self.came = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._run = event.run
        live = None if self.came or not self._run else read_live(live_path(self._folder, self._run))
        if live is not None and _worth_showing(live):
            self.came = True
            self._act()


def _worth_showing(live: Live) -> bool:
    answered = sum(agent.state == "answered" for agent in live.agents)
    awaited = sum(agent.state == "awaited" for agent in live.agents)
    return live.round >= ROUND and awaited >= 8 and answered >= 30


def _shoot(camera: _Camera, folder: Path) -> None:
    (run,) = (folder / "runs").iterdir()
    live = read_live(live_path(folder, run.name))
    assert live is not None
    with Source(folder, version="0.1.0", wall_s=lambda: live.updated_s) as source:
        view = source.view()
    with Dashboard("127.0.0.1", 0, look=lambda: view, metrics=exposition) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        camera.take(dashboard.url, IMAGES / "dashboard.png", 1060, 1950)
        camera.take(dashboard.url, IMAGES / "dashboard-dark.png", 1060, 1950, dark=True)
        camera.take(dashboard.url, IMAGES / "dashboard-phone.png", 400, 1500)
        dashboard.shutdown()


if __name__ == "__main__":
    sys.exit(main())

"""A training run as a service: what systemd is told of it, by the events that people watch it by.

Ready when the rounds begin: the job was checked, traced and the broker reached by then. While they run, the watchdog is
fed by the loop that drives them. What comes after the last round (accounts, summary, report) runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sordino_common.daemon.liveness import Liveness
from sordino_common.daemon.notify import Notifier
from sordino_common.daemon.state import StateProbe
from sordino_common.errors import SordinoError
from sordino_common.transport.reactor import Reactor
from sordino_server.progress import line_of
from sordino_server.rounds.events import Event, Observer, RunDone, RunStarted

AFTER_S: Final = 600.0  # for what is left to do after the last round, or after a signal


@contextmanager
def served(notifier: Notifier, reactor: Reactor, folder: Path) -> Iterator[Observer]:
    """The observer that tells `notifier`. `folder`: where the run's state goes, for the probe."""
    rounds = 0
    runs = folder / "runs.sqlite"  # absent where the records are in another database
    liveness = Liveness(reactor, notifier, probes={"state": StateProbe(folder, [runs] if runs.exists() else [])})

    def observe(event: Event) -> None:
        nonlocal rounds
        if isinstance(event, RunStarted):
            rounds = event.rounds
            notifier.ready()
            liveness.start()
        line = line_of(event, rounds=rounds)
        if line is not None:
            notifier.status(line)
        if isinstance(event, RunDone):
            liveness.stop()
            notifier.stopping(AFTER_S)

    try:
        yield observe
    except SordinoError as error:
        notifier.status(str(error))  # it stays in `systemctl status` when the process is gone
        raise
    finally:
        liveness.stop()

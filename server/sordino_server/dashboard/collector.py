"""One thread that looks, so that many may ask: it alone owns run records and the connection to the broker.

A view is made when somebody asks and the last one is old; nobody asks, nothing is read.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sordino_common.errors import FleetUnavailable, LocalError, SordinoError
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor
from sordino_server.dashboard.births import listening
from sordino_server.dashboard.source import Source
from sordino_server.dashboard.view import View
from sordino_server.home import Home

log = logging.getLogger("sordino.web")

FRESH_S: Final = 1.0
_ANSWER_S: Final = 20.0


class Collector:
    """A context manager. `broker`: how to listen for births; None: not at all."""

    def __init__(
        self, folder: Path, *, version: str, broker: MqttSettings | None = None, database: str | None = None
    ) -> None:
        self._folder = folder
        self._version = version
        self._broker = broker
        self._database = database
        self._reactor: Reactor | None = None
        self._changed = threading.Condition()
        self._wanted = self._stopped = False
        self._view: View | None = None
        self._error: SordinoError | None = None
        self._knocks = self._heard = 0
        self._made = 0  # views and failures, ever
        self._made_s = 0.0
        self._thread = threading.Thread(target=self._run, name="sordino-web-collector", daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._wake()
        self._thread.join(_ANSWER_S)

    def view(self) -> View:
        """At most `FRESH_S` old. Raises what keeps it from being made; `FleetUnavailable` if that takes too long."""
        with self._changed:
            made = self._made
            if self._reactor is None or self._view is None or self._reactor.now_s() - self._made_s > FRESH_S:
                self._wanted = True
                self._wake()
                if not self._changed.wait_for(lambda: self._made > made, _ANSWER_S):
                    raise FleetUnavailable(
                        f"the run records gave no answer in {_ANSWER_S:g} s: is the disk overloaded?"
                    )
            if self._error is not None:
                raise self._error
            assert self._view is not None
            return self._view

    def knock(self) -> None:
        """Ask the thread for a sign of life, which `heard` tells of."""
        with self._changed:
            self._knocks += 1
            self._wake()

    @property
    def heard(self) -> bool:
        """Whether the thread has turned since the last knock."""
        with self._changed:
            return self._heard == self._knocks

    def _wake(self) -> None:
        if self._reactor is not None:
            self._reactor.wake()

    def _run(self) -> None:
        with ExitStack() as stack:
            births = None
            if self._broker is None:
                reactor = stack.enter_context(Reactor())
            else:
                births, reactor = stack.enter_context(listening(Home(self._folder), self._broker))
            source = stack.enter_context(
                Source(self._folder, version=self._version, births=births, database=self._database)
            )
            with self._changed:
                self._reactor = reactor
            while True:
                reactor.run_until(self._called, deadline_s=float("inf"))
                if self._stopped:
                    return
                with self._changed:
                    self._heard = self._knocks
                if self._wanted:
                    self._look(source, reactor)

    def _called(self) -> bool:
        return self._wanted or self._stopped or self._heard != self._knocks

    def _look(self, source: Source, reactor: Reactor) -> None:
        view, error = None, None
        try:
            view = source.view()
        except SordinoError as problem:
            error = problem
            source.close()  # opened again next time: it may have been put back
        except Exception as problem:
            log.exception("event=bug where=collector")
            error = LocalError(f"a bug in sordino web ({type(problem).__name__}); its log has the trace")
        with self._changed:
            self._view, self._error = view, error
            self._wanted = False
            self._made += 1
            self._made_s = reactor.now_s()
            self._changed.notify_all()

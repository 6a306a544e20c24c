"""A run's events as log records with fields: for the journal and for machines, where people see `ProgressView`."""

from __future__ import annotations

import logging
from types import TracebackType

from sordino_common.errors import SordinoError
from sordino_server.rounds.events import Answered, Event, Note, RoundDone, RoundStarted, RunDone, RunStarted, Waiting

log = logging.getLogger("sordino.server")


class EventLog:
    """An observer and a context manager: an error that passes through it is the run's end."""

    def __init__(self) -> None:
        self._run = "-"
        self._round = 0

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            code = error.code if isinstance(error, SordinoError) else type(error).__name__
            log.error("event=run-failed run=%s round=%d code=%s reason=%r", self._run, self._round, code, str(error))

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run, self._round = event.run, event.first_round - 1
                log.info(
                    "event=run-started run=%s job=%s mode=%s security=%r first_round=%d rounds=%d agents=%d",
                    *(event.run, event.job, event.mode, event.security, event.first_round, event.rounds),
                    len(event.members),
                )
            case RoundStarted():
                self._round = event.round
                log.info(
                    "event=round-started run=%s round=%d attempt=%d asked=%d",
                    *(self._run, event.round, event.attempt, len(event.asked)),
                )
            case Waiting():
                log.info(
                    "event=waiting run=%s round=%d purpose=%r have=%d quorum=%d left_s=%.0f awaited=%r",
                    *(self._run, self._round, event.purpose, event.have, event.quorum, event.left_s),
                    " ".join(event.names[:20]),
                )
            case Answered() if event.outcome != "answered":
                log.warning(
                    "event=no-answer run=%s round=%d peer=%s outcome=%s purpose=%r reason=%r",
                    *(self._run, self._round, event.name, event.outcome, event.purpose, event.note),
                )
            case RoundDone(record=record):
                metrics = " ".join(f"{name}:{value:.6g}" for name, value in record.metrics.items())
                log.info(
                    "event=round-done run=%s round=%d loss=%s metrics=%r answered=%d asked=%d bytes_up=%d "
                    "bytes_down=%d seconds=%.3f",
                    *(self._run, record.round, record.loss, metrics, len(record.shares) - record.dropouts),
                    *(len(record.shares), record.bytes_up, record.bytes_down, record.seconds),
                )
            case Note():
                level = logging.WARNING if event.level == "warning" else logging.INFO
                log.log(level, "event=note run=%s round=%d text=%r", self._run, self._round, event.text)
            case RunDone():
                rounds, found = event.summary.get("rounds"), event.summary.get("metrics")
                log.info("event=run-done run=%s rounds=%s metrics=%r", self._run, rounds, found)
            case _:
                pass

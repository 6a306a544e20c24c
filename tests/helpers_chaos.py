"""What must hold whatever goes wrong, watched while a simulated fleet works: nothing is lost or released twice.

a noised answer leaves only after a charge of its own         (the device's ledger, at least as many as answers)
one contribution of a device to a sum, whatever restarts      (two, masked anew, would still be two releases)
one share of a helper to a sum, one sum to a number           (two sets' shares differ by a device's mask)
shares of a session on shares from one boot only, burnt before
numbers of sums are never given twice, and releases only grow (the server's records, over its kills)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.core import AgentCore
from sordino_agent.ledger import Ledger
from sordino_agent.rounds import Rounds
from sordino_agent.spdz.session import Session
from sordino_common import messages as m
from sordino_server.store import RunStore


@dataclass
class Watch:
    """`begin` patches the classes that fleets are made of; what breaks the law is in `broken`, by name."""

    charges: Counter[int] = field(default_factory=Counter)  # ledger -> entries
    released: dict[int, set[bytes]] = field(default_factory=dict)  # ledger -> noised answers that left
    commands: dict[bytes, m.Message] = field(default_factory=dict)  # session of a sum -> what was asked
    contributions: dict[tuple[str, bytes], set[bytes]] = field(default_factory=dict)
    shares: dict[tuple[str, bytes], set[bytes]] = field(default_factory=dict)
    answered: dict[tuple[str, str, int], set[bytes]] = field(default_factory=dict)  # helper, run, number -> sessions
    numbers: dict[str, list[int]] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    opened: dict[tuple[str, bytes], set[Session]] = field(default_factory=dict)  # agent, session on shares -> boots
    broken: list[str] = field(default_factory=list)

    def begin(self, patch: pytest.MonkeyPatch) -> Watch:
        self._patch_agents(patch)
        self._patch_shares(patch)
        self._patch_server(patch)
        return self

    def check(self) -> None:
        assert not self.broken, self.broken
        twice = {key: len(found) for key, found in self.contributions.items() if len(found) > 1}
        assert not twice, f"contributions to one sum: {twice}"
        twice = {key: len(found) for key, found in self.shares.items() if len(found) > 1}
        assert not twice, f"shares of one helper to one sum: {twice}"
        several = {key: len(found) for key, found in self.answered.items() if len(found) > 1}
        assert not several, f"sums of one number: {several}"
        for run, numbers in self.numbers.items():
            assert numbers == sorted(set(numbers)), f"numbers of {run}: {numbers}"
        boots = {key: len(found) for key, found in self.opened.items() if len(found) > 1}
        assert not boots, f"sessions on shares that more than one boot sent shares in: {boots}"

    def _patch_agents(self, patch: pytest.MonkeyPatch) -> None:
        charge, send, allowance, burn = Ledger.charge, AgentCore._send, Rounds.allowance, SumJournal.burn

        def watched_charge(ledger: Ledger, charges: Any) -> None:
            charge(ledger, charges)
            self.charges[id(ledger)] += len(charges)

        def watched_allowance(rounds: Rounds, command: Any) -> Any:
            self.commands[command.terms.session] = command
            return allowance(rounds, command)

        def watched_send(core: AgentCore, asker: Any, message: m.Message) -> None:
            content = hashlib.sha256(m.encode_message(message)).digest()
            match message:
                case m.Contribution():
                    self.contributions.setdefault((core.name, message.session), set()).add(content)
                    command = self.commands[message.session]
                    terms: m.SumTerms = command.terms  # type: ignore[attr-defined]
                    if terms.noise is not None or getattr(command, "privacy", None) is not None:
                        self._release(core, content)
                case m.Trained() if core._ledger.budgets:
                    self._release(core, content)
                case m.SumShare():
                    self.shares.setdefault((core.name, message.session), set()).add(content)
                    if not any(message.session in sessions for sessions in self.answered.values()):
                        self.broken.append(f"{core.name} answers a sum that is not burnt")
            send(core, asker, message)

        def watched_burn(journal: SumJournal, terms: m.SumTerms, members: bytes, *, wall_s: float) -> None:
            burn(journal, terms, members, wall_s=wall_s)
            self.answered.setdefault((str(id(journal)), terms.run, terms.index), set()).add(terms.session)

        patch.setattr(Ledger, "charge", watched_charge)
        patch.setattr(Rounds, "allowance", watched_allowance)
        patch.setattr(AgentCore, "_send", watched_send)
        patch.setattr(SumJournal, "burn", watched_burn)

    def _release(self, core: AgentCore, content: bytes) -> None:
        ledger = id(core._ledger)
        released = self.released.setdefault(ledger, set())
        released.add(content)
        if len(released) > self.charges[ledger]:
            self.broken.append(f"{core.name}: {len(released)} releases, {self.charges[ledger]} charges")

    def _patch_shares(self, patch: pytest.MonkeyPatch) -> None:
        send_shares = Session._send_shares

        def watched(session: Session, shares: Any) -> None:
            self.opened.setdefault((session._agent, session.id), set()).add(session)
            send_shares(session, shares)
            step, attempt = session._journal.burnt_steps(session.id)
            if any(share.step >= step or share.attempt > attempt for share in shares):
                self.broken.append(f"{session._agent} sends shares of steps that are not burnt")

        patch.setattr(Session, "_send_shares", watched)

    def _patch_server(self, patch: pytest.MonkeyPatch) -> None:
        next_sum, begin = RunStore.next_sum, RunStore.begin

        def watched_next(store: RunStore, run: str) -> int:
            number = next_sum(store, run)
            self.numbers.setdefault(run, []).append(number)
            return number

        def watched_begin(store: RunStore, run: str, releases: int) -> None:
            begin(store, run, releases)
            if store.begun(run) < max(releases, self.begun.get(run, 0)):
                self.broken.append(f"{run}: releases that have begun became fewer")
            self.begun[run] = store.begun(run)

        patch.setattr(RunStore, "next_sum", watched_next)
        patch.setattr(RunStore, "begin", watched_begin)

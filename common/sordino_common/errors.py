"""Every error that Sordino raises on purpose, with the exit code that a command ends with.

Two families matter to a reader of protocol code: a `LocalError` is our own mistake (a caller broke the
contract of a function), a `RemoteError` is the peer's fault (what arrived is malformed, forged, late or not
allowed). A state machine that raises either has changed nothing.

Exit codes: 0 done, 1 our bug, 2 usage or configuration, 3 fleet unavailable (deadline, quorum, broker),
4 security abort (MAC, signature, policy), 5 privacy budget refused.
"""

from __future__ import annotations

from typing import ClassVar


class SordinoError(Exception):
    """Base of all errors that are raised on purpose. `code` is its stable name on the wire and in JSON."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"


class LocalError(SordinoError):
    """Our own code called a function in a way that its contract forbids: a bug here, not at the peer."""

    code = "local-error"


class ConfigError(SordinoError):
    """A configuration or job file, or the command line, is wrong. The text says where and how to mend it."""

    exit_code = 2
    code = "config"


class PlanError(SordinoError):
    """A Plan is malformed, or it asks for an op, shape, dtype or size that is not allowed."""

    exit_code = 2
    code = "plan"


class FleetUnavailable(SordinoError):
    """A deadline passed, a quorum was missed, or the broker can't be reached. Names who is missing."""

    exit_code = 3
    code = "fleet-unavailable"


class LimitExceeded(SordinoError):
    """Work was stopped or refused because it would pass a configured limit (memory, time, payload)."""

    exit_code = 3
    code = "limit"


class RemoteError(SordinoError):
    """What a peer sent is malformed, forged, replayed or not allowed."""

    exit_code = 4
    code = "remote-error"


class CodecError(RemoteError):
    """Bytes that are not one strictly encoded, registered, bounded message."""

    code = "codec"


class ProtocolMismatch(RemoteError):
    """A peer whose version of the protocol is not ours nor a neighbour's. The text says what to upgrade."""

    exit_code = 2
    code = "protocol"
    peer: str = ""


class SignatureError(RemoteError):
    """A signature does not verify under the key that the roster or the pinned operator key names."""

    code = "signature"


class CertificateError(RemoteError):
    """A certificate or a request for one is malformed, expired, signed by another authority, or for another key."""

    code = "certificate"


class RosterError(RemoteError):
    """A roster is malformed, stale (epoch), expired, or does not list the party in question."""

    code = "roster"


class RosterVersion(RosterError):
    """A roster of a form that this software does not know, signed by the right operator: upgrade."""

    exit_code = 2
    code = "roster-version"


class StaleEpoch(RosterError):
    """A roster or a handshake carries an epoch older than the one already accepted."""

    code = "stale-epoch"


class HandshakeError(RemoteError):
    """A session could not be set up: wrong keys, ids, epoch, context, or a degenerate shared secret."""

    code = "handshake"


class SessionError(RemoteError):
    """A packet does not belong to the live session: forged, replayed, or out of the counter window."""

    code = "session"


class PolicyRefusal(RemoteError):
    """A command asks for what this device's own policy does not allow."""

    code = "policy"


class BudgetRefused(SordinoError):
    """A device's privacy budget can't afford the round."""

    exit_code = 5
    code = "budget"

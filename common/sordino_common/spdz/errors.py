"""What ends a session on secret shares. All but `UncheckedOpenings` are somebody else's fault: exit code 4."""

from __future__ import annotations

from sordino_common.errors import LocalError, RemoteError


class MacCheckError(RemoteError):
    """The MAC check failed: a member or the dealer's preprocessing cheats, or a value left the range that the job
    states. The session and its keys are dead, nothing was output."""

    code = "mac-check"


class EquivocationError(RemoteError):
    """The members saw different openings: somebody told different members different things."""

    code = "equivocation"


class CommitmentError(RemoteError):
    """A member opened something else than it had committed to."""

    code = "commitment"


class ProtocolError(RemoteError):
    """A member sent what the protocol does not have: wrong kind, size, order, or two contents for one place."""

    code = "protocol"


class CorrectionError(RemoteError):
    """The dealer's correction does not have the size that the circuit asks for, or came twice with other contents."""

    code = "correction"


class RetriesExhausted(RemoteError):
    """One step met `MaskAtEdge` more often than the session allows: by chance that does not happen."""

    code = "mask-at-edge"


class StateAtEdge(RemoteError):
    """Masked first parameters met the edge of the ring, where they may have wrapped: by chance, and whatever they are.
    Nothing has left; another session masks them anew."""

    code = "state-at-edge"


class OutOfRange(RemoteError):
    """A value is larger than the range that the job states for it. Says which input, never the value."""

    code = "out-of-range"


class SessionDead(RemoteError):
    """The session ended with an error before; nothing more happens in it."""

    code = "session-dead"


class UncheckedOpenings(LocalError):
    """A session was closed while openings were not checked: whoever meant to throw them away says `abandon`."""

    code = "unchecked-openings"

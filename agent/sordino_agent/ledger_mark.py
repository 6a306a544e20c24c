"""The mark beside a privacy ledger: that there is one, and how far it had come. See `ledger.py`.

One line: the number of this form, the ledger's id, a count, a digest. The form before had no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sordino_agent.errors import LedgerError
from sordino_common.channel.files import write_atomically

FORM: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """There is a ledger with this id, its first `count` entries end with `digest` (empty if there are none)."""

    ledger: bytes
    count: int
    digest: bytes


def mark_path(path: Path) -> Path:
    """Where the mark of the ledger at `path` lies."""
    return path.with_suffix(".mark")


def read_mark(path: Path) -> Mark | None:
    """The mark of the ledger at `path`; None if there is none. Raises `LedgerError`."""
    file = mark_path(path)
    try:
        words = file.read_bytes()[:256].decode("ascii", "replace").split()
        form, words = (1, words) if len(words) == 3 else (int(words[0]), words[1:]) if words else (0, words)
        if form > FORM:
            raise LedgerError(
                f"{file}: a ledger's mark of form {form}, written by a newer sordino-agent; this one knows up to "
                f"{FORM}. Upgrade sordino-agent, or put back ledger and mark from before the upgrade"
            )
        if form < 1:
            raise ValueError
        ledger, count, digest = words
        return Mark(ledger=bytes.fromhex(ledger), count=int(count), digest=bytes.fromhex(digest.replace("-", "")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{file}: can't be read: {error.strerror}. {give_up(path)}") from None
    except ValueError:
        raise LedgerError(f"{file}: not the mark of a privacy ledger. {give_up(path)}") from None


def write_mark(path: Path, mark: Mark) -> None:
    """Durable when it returns; nothing is written if it says so already. Raises `OSError`, `LedgerError`."""
    text = f"{FORM} {mark.ledger.hex()} {mark.count} {mark.digest.hex() or '-'}\n"
    if read_mark(path) != mark or mark_path(path).read_bytes() != text.encode("ascii"):
        write_atomically(mark_path(path), text.encode("ascii"), mode=0o600)


def give_up(path: Path) -> str:
    """The remedy of last resort, for error texts."""
    return (
        "If it is lost, what it counted is lost too: only the device's owner can decide to start from nothing, by "
        f"removing {mark_path(path)}"
    )

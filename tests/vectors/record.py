"""Records the conversations of a release into recorded-VERSION/: python tests/vectors/record.py VERSION [--again].

Until the release is published its recording may be made again (0.1 is not published yet: a change of the wire made on
purpose is recorded anew, and the difference read); after that never, and a change of the wire counts the protocol up
(`sordino_common/messages/protocol.py`). The recordings of all releases that speak this
major version of the protocol stay, and tests/sim/test_recorded.py replays each of them for good.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import msgspec

from helpers_recording import CONVERSATIONS, record


def main() -> int:
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--again"]):
        sys.stderr.write("record.py: name the version, as in 0.1\n")
        return 2
    folder = Path(__file__).parent / f"recorded-{sys.argv[1]}"
    if folder.exists() and sys.argv[2:] != ["--again"]:
        sys.stderr.write(f"{folder}: is there; --again makes it once more, if the release is not published yet\n")
        return 2
    folder.mkdir(exist_ok=True)
    for name in CONVERSATIONS:
        made = record(name, software=sys.argv[1])
        (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
        sys.stdout.write(f"{name}: {len(made.packets)} packets, {len(made.messages)} messages\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

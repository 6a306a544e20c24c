"""`python -m sordino_agent.start_worker`: the worker process, without what libraries load for nothing."""

from __future__ import annotations

import sys
from typing import Final

from sordino_common.lazy import import_lazily

# Together a megabyte of a worker that uses none of them, unless a rare task does.
_UNUSED: Final = (
    "bz2",  # zipfile and shutil: NumPy's archives are stored or deflated
    "ctypes",  # NumPy, for arrays that are handed to foreign functions
    "ipaddress",  # urllib.parse, for hosts in brackets; pathlib has it quote paths
    "lzma",  # as bz2
    "selectors",  # socket, to send whole files
    "tokenize",  # linecache and inspect, for the source lines of a traceback
)


def main() -> int:
    import_lazily(*_UNUSED)  # before the modules that import them
    from sordino_agent import worker

    return worker.main()


if __name__ == "__main__":
    sys.exit(main())

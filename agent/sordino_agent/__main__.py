"""`sordino-agent`, `python -m sordino_agent`: the command line, without what libraries load for nothing."""

from __future__ import annotations

import sys
from typing import Final

from sordino_common.lazy import import_lazily

# Together half a megabyte of a daemon that uses none of them.
_UNUSED: Final = (
    "bz2",  # shutil, for archives; argparse asks shutil how wide the terminal is
    "ipaddress",  # urllib.parse, for hosts in brackets; pathlib has it quote paths
    "lzma",  # as bz2
    "tokenize",  # linecache and inspect, for the source lines of a traceback
)


def main() -> int:
    import_lazily(*_UNUSED)  # before the modules that import them
    from sordino_agent import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

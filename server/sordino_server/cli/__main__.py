"""`python -m sordino_server.cli`."""

from sordino_server.cli import main

main()

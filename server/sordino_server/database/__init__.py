"""Where run records live: SQLite in the fleet directory, or PostgreSQL.

base       the small interface that `RunStore` is written against, and its errors
sqlite     one file, no server
postgres   a server that several hosts reach (`pip install 'sordino[postgres]'`)
"""

from sordino_server.database.base import Database, Duplicate, Held, StoreUnavailable, open_records

__all__ = ["Database", "Duplicate", "Held", "StoreUnavailable", "open_records"]

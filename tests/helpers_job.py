"""Job files for table tests: a text, edits to it, and where the error is to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sordino_common.errors import ConfigError
from sordino_server.job import load_job

Edit = tuple[str, str]  # what stands in the text, and what stands there instead


def written_job(folder: Path, text: str, *edits: Edit, model: str = "") -> Path:
    """`text` with its `edits` as job.yaml, beside a model.py; every edit must find something to change."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / "model.py").write_text(model)
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


def refuses(path: Path, pattern: str) -> None:
    """Loading the job fails at the file, line and column, with the text, of `pattern`."""
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert re.search(pattern, str(caught.value)), str(caught.value)

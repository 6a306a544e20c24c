"""The guides run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["01-pointers.md"])
def test_guide(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text("utf-8")
    blocks = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert blocks
    space: dict[str, object] = {}
    for start, code in blocks:
        lines = "\n" * (text[:start].count("\n") + 1)  # so that an error names the page's own line
        exec(compile(lines + code, str(DOCS / page), "exec"), space)
    printed = capsys.readouterr().out
    assert "PointerTensor(alice) float32[]" in printed
    assert "never leave the device" in printed
    assert "listing, in policy.fetch" in printed

"""The guides run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each page has to have printed, beside what it asserts itself.
PAGES = {
    "01-pointers.md": ("PointerTensor(alice) float32[]", "never leave the device", "listing, in policy.fetch"),
    "02-federated-by-hand.md": ("('alice', ('x', 'warmth'), 120)", "never leave the device"),
    "03-shares.md": (
        "FixedPrecisionTensor(f=14) > MPCTensor[2, active] > PointerTensor(alice:…), PointerTensor(bob:…) float32[3]",
        "the MAC check after step 0 failed",
        "has lost its shares",
        "MPCTensor[2, passive]",
        "beyond the 8 that is stated",
    ),
    "04-inference.md": ("MPCTensor[2, active]", "never leave the device", "accuracy"),
    "05-boston.md": ("out/boston.svg",),
    "paper.md": ("FixedPrecisionTensor(f=14) > MPCTensor[2, active]", "needs a comparison of secrets"),
}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page == "05-boston.md" else page for page in PAGES]
)
def test_guide(page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # pages are read at the root of the repository
    monkeypatch.chdir(tmp_path)
    file = ROOT / "docs" / page
    text = file.read_text("utf-8")
    blocks = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert blocks
    space: dict[str, object] = {}
    for start, code in blocks:
        lines = "\n" * (text[:start].count("\n") + 1)  # so that an error names the page's own line
        exec(compile(lines + code, str(file), "exec"), space)
    printed = capsys.readouterr().out
    for words in PAGES[page]:
        assert words in printed

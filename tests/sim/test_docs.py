"""The guides run from top to bottom, and the README's own model is learned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sordino_server.cli import app, run_cli
from sordino_sim.cli import app as simulated

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


def test_the_readmes_own_model_is_learned_and_exported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for path, code in re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", text, re.DOTALL):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    short = ["--set", "train.rounds=2", "--no-baseline", "--json", "--quiet"]
    assert run_cli(simulated, ["run", "job.yaml", "--store", "runs", *short], program="sordino-sim") == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run_cli(app, ["runs", "--fleet", "runs"], program="sordino") == 0
    assert run in capsys.readouterr().out
    assert run_cli(app, ["export", run, "--fleet", "runs", "-o", "model.safetensors"], program="sordino") == 0
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * (13 * 32 + 32 + 32 + 1)


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

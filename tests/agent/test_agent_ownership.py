"""What root makes for the service's user belongs to that user, and nothing else does."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers_daemon import make_home
from sordino_agent import ownership
from sordino_agent.cli import main
from sordino_common.channel.identity import OperatorKey

USER = 65_534  # nobody


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(/etc/sordino, /var/lib/sordino-agent) of a device with the package."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    config, state = tmp_path / "etc", tmp_path / "state-of-the-service"
    config.mkdir()
    state.mkdir(mode=0o700)
    os.chown(state, USER, USER)
    monkeypatch.setattr(ownership, "CONFIG_FOLDER", config)
    monkeypatch.setattr(ownership, "STATE_FOLDER", state)
    return config, state


def test_init_by_root_leaves_a_service_that_can_start(service: tuple[Path, Path]) -> None:
    config, state = service
    key = OperatorKey.generate().public.hex()
    arguments = ["init", str(config), "--name", "pi-07", "--fleet", "demo", "--operator-key", key, "--broker", "b:1"]
    assert main(arguments) == 0
    key_file = (state / "agent.key").stat()
    assert (key_file.st_uid, stat.S_IMODE(key_file.st_mode)) == (USER, 0o600)
    found = (config / "agent.yaml").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, USER, 0o640)
    assert f'state_dir: "{state}"' in (config / "agent.yaml").read_text()


def test_links_and_files_of_others_are_left_alone(service: tuple[Path, Path], tmp_path: Path) -> None:
    """The service's user may have put them there, to be given a file of root's."""
    _, state = service
    secret = tmp_path / "shadow"
    secret.write_text("root's")
    (state / "symbolic").symlink_to(secret)
    os.link(secret, state / "hard")
    os.mkfifo(state / "pipe")
    (state / "mine").write_text("")
    home = make_home(tmp_path)
    home.edit('state_dir: "state"', f'state_dir: "{state}"')
    ownership.settle(home.folder / "agent.yaml")
    assert secret.stat().st_uid == 0
    assert (state / "pipe").stat().st_uid == 0
    assert (state / "mine").stat().st_uid == USER


def test_what_the_service_cant_read_roots_check_does_not_read_either() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    python = Path("/usr/bin/python{}.{}".format(*sys.version_info[:2]))
    if not python.exists():
        pytest.skip(f"no {python}: a Python in root's own folders can't be run as somebody else")
    with tempfile.TemporaryDirectory() as scratch:  # tests' own folders are closed to others
        Path(scratch).chmod(0o755)
        home = make_home(Path(scratch))
        rows = next(home.folder.rglob("*.csv"))
        rows.chmod(0o600)
        for path in (home.folder, *home.folder.rglob("*")):
            if path != rows:
                os.chown(path, USER, USER)
        check = [str(python), "-m", "sordino_agent", "check", "--offline", str(home.folder)]
        ours = [entry for entry in sys.path if not entry.startswith(sys.base_prefix)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(ours)}
        done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False, cwd="/", env=environment)
        assert done.returncode == 2
        assert f"{rows}: can't be read: Permission denied" in done.stdout
        os.chown(rows, USER, USER)
        done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False, cwd="/", env=environment)
        assert (done.returncode, f"{rows}: can't" in done.stdout) == (0, False)


def test_a_folder_elsewhere_keeps_its_state_beside_it(service: tuple[Path, Path], tmp_path: Path) -> None:
    assert ownership.state_dir_for(tmp_path / "elsewhere") == "state"
    home = make_home(tmp_path)
    ownership.settle(home.folder / "agent.yaml")
    assert (home.state / "agent.key").stat().st_uid == 0

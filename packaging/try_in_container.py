"""Both packages under a real systemd: installed in a Debian container, and a small fleet lived through in it.

    make deb && sudo .venv/bin/python packaging/try_in_container.py [--keep]

Boots with systemd-nspawn, without a network, in a copy of a minimal Debian of this machine's release (which decides the
Python that sordino-server was built for). That Debian is made once by debootstrap, from its own mirror, and kept in
.cache/container. Done is what docs/install.md and docs/operations.md say; what comes out otherwise ends the walk, with
the journal. It takes a few minutes, most of them for unpacking torch.

Needs root, systemd-container, debootstrap; the host need not run systemd itself. On a host whose memory controller is
cgroup v1's, MemoryMax= can't be set in the container, and is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
CACHE: Final = ROOT / ".cache" / "container"
INSIDE: Final = "systemd,systemd-sysv,dbus,mosquitto,python3,init-system-helpers,ca-certificates"
ARCH: Final = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
ENVIRONMENT: Final = ("HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
                      "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")  # fmt: skip
PATIENCE_S: Final = 90.0
AGENT, SERVER, DEALER, WEB = "sordino-agent", "sordino-server", "sordino-dealer", "sordino-web"
FLEET: Final = "/var/lib/sordino/fleet"
CONFIG: Final = "/etc/sordino/agent.yaml"
ENCRYPTED: Final = "sordino-agent.key:/etc/credstore.encrypted/sordino-agent.key"
AS_SERVER: Final = f"SORDINO_FLEET={FLEET} runuser -u sordino -- sordino"

ROWS: Final = """awk 'BEGIN { srand(1); print "load,heat,wear"; for (i = 0; i < 80; i++)
    { a = rand(); b = rand(); printf "%.4f,%.4f,%.4f\\n", a, b, 2 * a + b } }' >/srv/rows.csv"""
OFFER: Final = f"""sed -i '
    s|^datasets: .*|datasets: [{{name: boiler, path: /srv/rows.csv, test_rows: 20}}]|
    s|^  plans: .*|  plans: any|' {CONFIG}"""
JOB: Final = """\
job: wear
mode: federated
model: {file: linear.py}
data:
  {dataset: boiler, features: [load, heat], target: wear, task: regression,
   standardize: given, offset: [0.5, 0.5], scale: [0.3, 0.3]}
loss: mse
optimizer: {name: sgd, lr: 0.1}
train: {rounds: ROUNDS, local_steps: 2, batch_rows: 32, seed: 1, quorum: 1, join_s: 60}
"""


class Container:
    """A booted Debian in `root`. Commands are run in it by `sh`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        flags = ["--register=no", "--private-network", "--console=passive", "-q", "-M", f"sordino-{os.getpid()}"]
        if not Path("/run/systemd/system").exists():
            flags.append("--keep-unit")  # there is no systemd that could give us a unit
        self._log = (root.parent / "boot.log").open("wb")
        self._process = subprocess.Popen(
            ["systemd-nspawn", *flags, "-D", str(root), "-b"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )  # fmt: skip

    def leader(self) -> int:
        """The process id, here, of the container's systemd."""
        if self._process.poll() is not None:
            raise SystemExit(f"systemd-nspawn ended: {(self.root.parent / 'boot.log').read_text('utf-8', 'replace')}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def booted(self) -> bool:
        if self.leader() == 0:
            return False
        return self.run("systemctl is-system-running", ok=False).strip() in ("running", "degraded")

    def run(self, script: str, *, ok: bool = True) -> str:
        """What `script` prints, stderr included. Ends the walk if it fails, unless that may be: `ok`."""
        command = ["nsenter", "-t", str(self.leader()), "-a", "--", "env", "-i", *ENVIRONMENT, "sh", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if ok and done.returncode != 0:
            raise SystemExit(f"failed ({done.returncode}): {script}\n{done.stdout}{done.stderr}\n{self.journal()}")
        return done.stdout + done.stderr

    def fails(self, script: str) -> str:
        """What `script` prints; it must not succeed."""
        said = self.run(f"if {script}; then echo IT-SUCCEEDED; fi")
        self.must("IT-SUCCEEDED" not in said, f"{script}: succeeded, and should not have", said)
        return said

    def show(self, unit: str, name: str) -> str:
        return self.run(f"systemctl show -P {name} {unit}").strip()

    def until(self, done: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"after {PATIENCE_S:g} s still not: {what}\n{self.journal()}")
            time.sleep(0.2)

    def must(self, true: object, what: str, *context: str) -> None:
        if not true:
            raise SystemExit("\n".join((f"NOT SO: {what}", *context, self.journal())))

    def journal(self, lines: int = 40) -> str:
        with contextlib.suppress(SystemExit):
            return self.run(f"journalctl --no-pager -n {lines}", ok=False)
        return ""

    def events(self, unit: str, event: str) -> list[dict[str, str]]:
        """Records of the journal, by our own field."""
        said = self.run(f"journalctl --no-pager -o json -u {unit} SORDINO_EVENT={event}")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def stop(self) -> None:
        with contextlib.suppress(SystemExit, ProcessLookupError):
            os.kill(self.leader(), signal.SIGRTMIN + 4)  # poweroff.target, as systemd(1) has it
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


# --- the walk ------------------------------------------------------------------------------------------------------


def install(box: Container, *packages: Path) -> None:
    """Both packages; users, modes, and what is enabled."""
    for package in packages:
        shutil.copy(package, box.root / "root")
        box.run(f"dpkg --force-unsafe-io -i /root/{package.name}")
    for path, wanted in (
        ("/var/lib/sordino-agent", "sordino-agent 700"),
        (FLEET, "sordino 700"),
        ("/var/lib/sordino-dealer", "sordino-dealer 700"),
        ("/etc/credstore", "root 700"),
        ("/etc/credstore.encrypted", "root 700"),
        ("/etc/sordino", "root 755"),
    ):
        found = box.run(f"stat -c '%U %a' {path}").strip()
        box.must(found == wanted, f"{path} belongs to {wanted}", found)
    enabled = {name: box.run(f"systemctl is-enabled {name}", ok=False).strip() for name in
               (AGENT, SERVER, DEALER, WEB, "sordino-renew.timer")}  # fmt: skip
    box.must(list(enabled.values()) == ["enabled", "enabled", "disabled", "disabled", "enabled"], f"enabled: {enabled}")
    box.must(box.show("sordino-renew.timer", "ActiveState") == "active", "the timer has been started")
    box.run(f"systemctl start {AGENT} {SERVER}")  # and nothing happens: ConditionPathExists
    box.must(box.show(AGENT, "Result") == box.show(SERVER, "Result") == "success", "unconfigured services don't fail")
    box.must("No module named" not in box.run("sordino --help && sordino-agent --version"), "the programs run")


def broker(box: Container) -> None:
    """A fleet, and its broker as a service that never has root."""
    said = box.run("cd / && runuser -u sordino -- sordino init " + FLEET + " --fleet plant --broker localhost:8883")
    box.must("fleet plant in" in said, "a fleet", said)
    refused = box.fails(f"sordino runs --fleet {FLEET}")
    box.must("belongs to sordino, who could not read what root writes there" in refused, "root is refused", refused)
    box.run(f"install -d -o sordino /etc/mosquitto/plant && {AS_SERVER} broker-config /etc/mosquitto/plant")
    box.run("""chown -R mosquitto: /etc/mosquitto/plant
        install -D -m 644 /etc/mosquitto/plant/service.conf /etc/systemd/system/mosquitto.service.d/sordino.conf
        systemctl daemon-reload && systemctl restart mosquitto""")
    owner = box.run("stat -c %U /proc/$(systemctl show -P MainPID mosquitto)").strip()
    box.must(owner == "mosquitto", "the broker is mosquitto's", owner)


def enrol(box: Container) -> None:
    """From token to member, root on the device's side, the service's user on the server's."""
    box.run(f"{AS_SERVER} enroll-token --name pi-01 2>/dev/null >/root/line && sed 's|$| --wait 0|' /root/line | sh")
    said = box.run(f"{AS_SERVER} roster approve pi-01 --yes")
    box.must("delivered: the roster, and certificates for pi-01" in said, "approved", said)
    box.must("can't be written" not in said, "nothing about a list that nobody is on", said)
    box.must("enrolled: pi-01 is a member" in box.run("sordino-agent enroll --wait 20"), "enrolled")
    loose = box.run("find /var/lib/sordino-agent ! -user sordino-agent; find /etc/sordino -user sordino-agent").strip()
    box.must(not loose, "root has handed over what it made, and nothing else", loose)


def agent_starts(box: Container) -> None:
    """A check by root sees what the service sees; ready when the broker has answered; fields in the journal."""
    box.run(f"{ROWS}\n{OFFER}\nchmod 600 /srv/rows.csv")
    said = box.fails("sordino-agent check --offline")
    box.must("/srv/rows.csv: can't be read" in said, "the check is made with the service's rights", said)
    box.run("chgrp sordino-agent /srv/rows.csv && chmod 640 /srv/rows.csv && sordino-agent check")
    box.run(f"systemctl start {AGENT}")
    status = box.show(AGENT, "StatusText")
    box.must(status.startswith("pi-01 of plant; connected"), "ready when the broker has answered", status)
    (event,) = box.events(AGENT, "connection")
    uid = box.run("id -u sordino-agent").strip()
    wanted = {
        "SORDINO_CONNECTED": "True",
        "MESSAGE_ID": "2c47d0f5a8a04b3d9a70b6f4e2a71c05",
        "_UID": uid,
        "PRIORITY": "6",
    }
    box.must(all(event.get(key) == value for key, value in wanted.items()), f"the journal has {wanted}", str(event))
    status = box.run(f"cat /proc/{box.show(AGENT, 'MainPID')}/status")
    for line in ("CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        box.must(line in status, line, status)


def reload(box: Container) -> None:
    """A good file counts at once; a bad one changes nothing, and is named."""
    pid = box.show(AGENT, "MainPID")
    box.run(f"sed -i 's/min_rows: 10/min_rows: 12/' {CONFIG} && systemctl reload {AGENT}")
    box.until(lambda: box.events(AGENT, "reloaded"), "reloaded")
    box.run(f"sed -i 's/min_rows: 12/min_rows: twelve/' {CONFIG} && systemctl reload {AGENT}")
    box.until(lambda: "reload refused" in box.show(AGENT, "StatusText"), "the status names the fault")
    box.must(box.events(AGENT, "reload-failed"), "the journal names the fault")
    box.run(f"sed -i 's/min_rows: twelve/min_rows: 12/' {CONFIG} && systemctl reload {AGENT}")
    box.must(box.show(AGENT, "MainPID") == pid, "it is still the same process")


def watchdog(box: Container) -> None:
    """A stopped agent is killed and started again; the quick times are for here only."""
    drop_in = f"/etc/systemd/system/{AGENT}.service.d/quick.conf"
    box.run(f"mkdir -p {Path(drop_in).parent} && printf '[Service]\\nWatchdogSec=4\\nRestartSec=1\\n' >{drop_in}")
    box.run(f"systemctl daemon-reload && systemctl restart {AGENT}")
    pid = box.show(AGENT, "MainPID")
    box.run(f"kill -STOP {pid}")
    box.until(lambda: box.show(AGENT, "NRestarts") == "1" and box.show(AGENT, "ActiveState") == "active", "restarted")
    said = box.run(f"journalctl --no-pager -u {AGENT}")
    box.must(
        "Failed with result 'watchdog'" in said and "Current thread" in said, "the journal shows where it stood", said
    )


def broken_configuration(box: Container) -> None:
    """Exit code 2 is not tried again, and the status says why."""
    box.run(f"sed -i 's/min_rows: 12/min_rows: twelve/' {CONFIG}")
    box.fails(f"systemctl restart {AGENT}")
    time.sleep(3.0)  # three times RestartSec, of the step before
    found = [box.show(AGENT, name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")]
    box.must(found == ["failed", "2", "0"], f"failed, with 2, not tried again: {found}")
    status = box.show(AGENT, "StatusText")
    box.must("agent.yaml:" in status and "policy.min_rows" in status, "the status names file, line and field", status)
    box.run(f"sed -i 's/min_rows: twelve/min_rows: 12/' {CONFIG} && systemctl start {AGENT}")


def credentials(box: Container) -> None:
    """The key from systemd, plain and encrypted."""
    box.run(f"""install -m 600 /var/lib/sordino-agent/agent.key /etc/credstore/sordino-agent.key
        rm /var/lib/sordino-agent/agent.key
        sed -i '/^operator_key/i device_key: credential:sordino-agent.key' {CONFIG}
        systemctl restart {AGENT}""")
    box.run(f"""systemd-creds setup
        systemd-creds encrypt --name=sordino-agent.key /etc/credstore/sordino-agent.key \
            /etc/credstore.encrypted/sordino-agent.key
        rm /etc/credstore/sordino-agent.key
        cp /usr/share/doc/sordino-agent/examples/credential-encrypted.conf /etc/systemd/system/{AGENT}.service.d/
        systemctl daemon-reload && systemctl restart {AGENT}""")
    box.until(lambda: "connected" in box.show(AGENT, "StatusText"), "connected with an encrypted key")


def training(box: Container) -> None:
    """A run to its end; a second one that is stopped, goes on, and loses its agent, which drains."""
    (box.root / "etc/sordino/linear.py").write_text(
        "from torch import nn\n\n\ndef make_model():\n    return nn.Linear(2, 1)\n"
    )
    (box.root / "etc/sordino/job.yaml").write_text(JOB.replace("ROUNDS", "3"))
    box.run(f"systemctl start {SERVER}")
    box.until(lambda: box.show(SERVER, "ActiveState") == "inactive", "the run is done")
    found = box.show(SERVER, "Result"), box.show(SERVER, "StatusText")
    box.must(found[0] == "success" and found[1].startswith("done: "), f"a run: {found}")
    rounds = [event["SORDINO_ROUND"] for event in box.events(SERVER, "round-done")]
    box.must(rounds == ["1", "2", "3"], "the journal has each round, with its fields", str(rounds))
    box.must((box.root / FLEET[1:] / "report/report.html").exists(), "its report")
    box.run(f"systemctl start {SERVER}")  # a finished run stays finished
    box.until(lambda: box.show(SERVER, "ActiveState") == "inactive", "nothing to do")
    box.must(len(box.events(SERVER, "round-done")) == 3, "a finished run stays finished")

    (box.root / "etc/sordino/job.yaml").write_text(JOB.replace("ROUNDS", "100000"))
    box.run(f"sed -i 's/first-run/second-run/' /etc/sordino/server.env && systemctl start {SERVER}")
    box.until(lambda: len(box.events(SERVER, "round-done")) > 8, "rounds go by")
    box.run(f"systemctl stop {SERVER}")
    found = box.show(SERVER, "Result"), box.show(SERVER, "ExecMainStatus")
    box.must(found == ("success", "130"), f"a stop is no failure: {found}")
    before = max(int(event["SORDINO_ROUND"]) for event in box.events(SERVER, "round-done"))
    box.run(f"systemctl start {SERVER}")
    first = int(box.events(SERVER, "run-started")[-1]["SORDINO_FIRST_ROUND"])
    box.must(1 < first <= before + 1, f"it goes on from its checkpoint: round {first} after {before}")
    box.run(f"systemctl stop {AGENT}")
    box.must(box.show(AGENT, "Result") == "success", "the agent ends in order")
    box.must(box.events(AGENT, "drain") and box.events(AGENT, "stopped"), "and says that it drained")
    box.run(f"systemctl stop {SERVER}; systemctl start {AGENT}")


def dealer(box: Container) -> None:
    """The dealer's service, as far as it goes without being a member."""
    operator = (box.root / FLEET[1:] / "operator.pub").read_text().strip()
    box.run(
        f"runuser -u sordino-dealer -- sordino dealer init /var/lib/sordino-dealer --name midas --fleet plant \
        --operator-key {operator} --broker localhost:8883 && systemctl start {DEALER}"
    )
    status = box.show(DEALER, "StatusText")
    box.must(status.startswith("midas"), "ready, and the status says how it is", status)
    box.run(f"systemctl stop {DEALER}")
    box.must(box.show(DEALER, "Result") == "success", "it ends in order")


def dashboard(box: Container) -> None:
    """`sordino web` as a service: no key in its sight, a token as a credential."""
    box.run(f"systemctl start {WEB}")
    ask = (
        "python3 -c 'import urllib.request; print(urllib.request.urlopen(\"http://127.0.0.1:8642/view.json\").read())'"
    )
    box.must('"fleet":"plant"' in box.run(ask), "it answers")
    pid = box.show(WEB, "MainPID")
    uid = box.run("id -u sordino").strip()
    inside = f"nsenter -t {pid} -m -- setpriv --reuid {uid} --clear-groups"  # its mounts, its user
    box.run(f"{inside} head -c 1 {FLEET}/fleet.yaml")
    for name in ("server.key", "server.pem", "operator.key", "ca/ca.key", "enrolment.sqlite"):
        box.fails(f"{inside} head -c 1 {FLEET}/{name}")
    box.fails(f"{inside} sh -c 'echo >>{FLEET}/fleet.yaml'")
    box.run("""(umask 077; echo 0123456789abcdef0123456789abcdef >/etc/credstore/sordino-web.token)
        echo SORDINO_WEB_TOKEN_FILE=credential:sordino-web.token >/etc/sordino/web.env
        systemctl restart sordino-web""")
    box.must("401" in box.fails(ask), "without the token nobody looks")
    box.run(f"systemctl stop {WEB}")
    box.must(box.show(WEB, "Result") == "success", "it ends in order")


def renewal(box: Container) -> None:
    """A new certificate by the timer's service, while the device's key is a credential."""
    renew = f"systemd-run -q --pipe --wait -p LoadCredentialEncrypted={ENCRYPTED} -- sordino-agent renew"
    box.run(f"{renew} --wait 0 && systemctl start sordino-renew.service")
    said = box.run("journalctl --no-pager -u sordino-renew")
    box.must("certificate for pi-01" in said and " 0 errors" in said, "renewed, and the doctor is content", said)
    said = box.run(f"{renew} --wait 20")
    box.must("renewed" in said, "the device has it", said)
    owner = box.run("stat -c '%U %a' /var/lib/sordino-agent/broker.pem").strip()
    box.must(owner == "sordino-agent 600", "and the service can read it", owner)


def upgrade(box: Container, package: Path) -> None:
    """A higher version of the agent: restarted, and all that makes it itself is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["dpkg-deb", "-R", str(package), str(tree)], check=True)
        control = tree / "DEBIAN" / "control"
        control.write_text(control.read_text().replace("Version: ", "Version: 1:", 1))
        subprocess.run(["dpkg-deb", "-Znone", "-b", str(tree), str(box.root / "root/newer.deb")],
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    look = f"cat {CONFIG} && sordino-agent budget && ls /var/lib/sordino-agent"
    pid, kept = box.show(AGENT, "MainPID"), box.run(look)
    box.run("dpkg --force-unsafe-io -i /root/newer.deb")
    active = box.show(AGENT, "ActiveState") == "active"
    box.must(active and box.show(AGENT, "MainPID") != pid, "restarted by the upgrade")
    box.must("1:" in box.run("dpkg-query -W sordino-agent"), "the newer version")
    found = box.run(look)
    box.must(found == kept, "configuration, ledger and state files are the same", kept, found)


def purge(box: Container) -> None:
    """What the agent made goes, what others made stays, and is named."""
    box.run("touch /var/lib/sordino-agent/rows-of-the-owner.csv && dpkg -r sordino-agent")
    box.must(box.show(AGENT, "LoadState") in ("masked", "not-found"), "no unit is left")
    box.run(f"test -e {CONFIG} && dpkg -P sordino-agent")
    left = box.run(
        "find /var/lib/sordino-agent /opt/sordino-agent /etc/credstore*/sordino-agent* ! -type d", ok=False
    ).split("\n")
    left = [line for line in left if line and "No such file" not in line]
    box.must(left == ["/var/lib/sordino-agent/rows-of-the-owner.csv"], "nothing but the owner's is left", str(left))
    said = box.run("dpkg -P sordino-server 2>&1")
    box.must(f"{Path(FLEET).parent} is kept" in said, "a fleet is not thrown away", said)
    box.run(f"test -e {FLEET}/operator.key && test -e {FLEET}/runs.sqlite && ! test -e /opt/sordino-server")
    failed = box.run("systemctl --failed --no-legend --plain").strip()
    box.must(not failed, "nothing has failed", failed)


# --- the container ---------------------------------------------------------------------------------------------------


def base(suite: str) -> Path:
    """A minimal Debian; made once."""
    folder = CACHE / suite
    if folder.exists():
        return folder
    draft = CACHE / f"{suite}.new"
    shutil.rmtree(draft, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={INSIDE}", suite, str(draft)], check=True
    )  # from its own mirror
    (draft / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    draft.rename(folder)
    return folder


@contextlib.contextmanager
def booted(suite: str, *, keep: bool) -> Iterator[Container]:
    """A container of a copy of `base`, which is removed in the end unless `keep`."""
    folder = Path(tempfile.mkdtemp(prefix="sordino-container-", dir=CACHE))
    try:
        subprocess.run(["cp", "-a", "--reflink=auto", str(base(suite)), str(folder / "root")], check=True)
        box = Container(folder / "root")
        try:
            box.until(box.booted, "booted")
            yield box
        finally:
            box.stop()
    finally:
        if keep:
            sys.stderr.write(f"kept: {folder / 'root'}\n")
        else:
            shutil.rmtree(folder)


def built(name: str) -> Path:
    """The newest package in out/. Raises `SystemExit`."""
    found = sorted((ROOT / "out").glob(f"{name}_*_{ARCH}.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no out/{name}_*_{ARCH}.deb: build it with `make deb`, or name one")
    return found[-1]


def release() -> str:
    found = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return shlex.split(found.get("VERSION_CODENAME", "''"))[0] if found.get("ID") == "debian" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Try the packages under a real systemd, in a container.")
    parser.add_argument("--agent", type=Path, help="the package; default: the one in out/")
    parser.add_argument("--server", type=Path)
    parser.add_argument("--suite", default=release(), help="the Debian inside; default: this machine's release")
    parser.add_argument("--keep", action="store_true", help="leave the container's files, to look at")
    arguments = parser.parse_args()
    missing = [name for name in ("systemd-nspawn", "debootstrap", "nsenter", "dpkg-deb") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(
            f"needs root, and: {', '.join(missing) or 'nothing else'} (apt install systemd-container debootstrap)"
        )
    if not arguments.suite:
        raise SystemExit("this is no Debian: say --suite, one with the Python that sordino-server was built for")
    agent, server = arguments.agent or built(AGENT), arguments.server or built(SERVER)
    began_s = time.monotonic()
    CACHE.mkdir(parents=True, exist_ok=True)
    with booted(arguments.suite, keep=arguments.keep) as box:
        sys.stdout.write(f"booted: {box.run('systemctl --version').splitlines()[0]}\n")
        steps: list[tuple[Callable[..., None], tuple[Path, ...]]] = [
            (install, (agent, server)), (broker, ()), (enrol, ()), (agent_starts, ()), (reload, ()), (watchdog, ()),
            (broken_configuration, ()), (credentials, ()), (training, ()), (dealer, ()), (dashboard, ()), (renewal, ()),
            (upgrade, (agent,)), (purge, ()),
        ]  # fmt: skip
        for step, files in steps:
            at_s = time.monotonic()
            step(box, *files)
            words = (step.__doc__ or "").strip().split("\n")[0]
            sys.stdout.write(f"ok {time.monotonic() - at_s:5.1f} s  {step.__name__}: {words}\n")
            sys.stdout.flush()
    sys.stdout.write(f"all as documented, in {time.monotonic() - began_s:.0f} s\n")


if __name__ == "__main__":
    main()

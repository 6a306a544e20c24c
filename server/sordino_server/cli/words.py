"""What `--help` and the manual pages say beyond what a command's signature does: examples, exit codes, files."""

from __future__ import annotations

import inspect
from typing import Final

import typer

SUMMARY: Final = "train one model on the data of a fleet of devices, which keep them"
SIM_SUMMARY: Final = "the whole fleet on one machine, simulated or as processes"
EXIT_LINE: Final = (
    "Exit codes: 0 done, 1 a bug of ours, 2 command line or configuration, 3 fleet or broker unavailable (try again), "
    "4 stopped for security, 5 a device's privacy budget can't afford it, 130 interrupted."
)

# By the words of the command: (what it does, the command line).
EXAMPLES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "init": (("a new fleet", "sordino init lab --fleet lab --broker broker.example:8883"),),
    "broker-config": (
        ("a broker with the fleet's rules", "sordino broker-config broker --host broker.example --fleet lab"),
    ),
    "enroll-token": (
        ("a token for one device", "sordino enroll-token --name pi-01 --fleet lab"),
        ("for each name of a list, a file", "sordino enroll-token --names pis.txt -o tokens --fleet lab"),
    ),
    "agents": (
        ("who is there", "sordino agents --fleet lab"),
        ("for a script", "sordino agents --fleet lab --json --wait 10"),
    ),
    "plans": (("what owners have to allow", "sordino plans examples/boston-fedavg.yaml"),),
    "train": (
        ("a job", "sordino train job.yaml --fleet lab --report out"),
        ("go on after a stop", "sordino train --resume boston-20260101-1200-ab12 --fleet lab"),
    ),
    "runs": (("all runs", "sordino runs --fleet lab"),),
    "show": (("one run", "sordino show boston-20260101-1200-ab12 --fleet lab"),),
    "export": (("the model", "sordino export boston-20260101-1200-ab12 --fleet lab -o model.safetensors"),),
    "doctor": (
        ("everything", "sordino doctor --fleet lab"),
        ("what is wrong, without the network", "sordino doctor --fleet lab --offline --quiet"),
    ),
    "top": (("watch", "sordino top --fleet lab"),),
    "web": (("in a browser", "sordino web --fleet lab"),),
    "completion": (
        ("bash, in this shell", 'eval "$(sordino completion bash)"'),
        ("fish, for good", "sordino completion fish > ~/.config/fish/completions/sordino.fish"),
    ),
    "support-bundle": (("for a bug report", "sordino support-bundle --fleet lab"),),
    "roster add": (("a request that came by hand", "sordino roster add enrolment.json --fleet lab"),),
    "roster remove": (("take a device out", "sordino roster remove pi-01 && sordino roster sign"),),
    "roster list": (("draft and signed", "sordino roster list --fleet lab"),),
    "roster sign": (("make the draft count", "sordino roster sign --fleet lab"),),
    "roster pending": (("what waits for you", "sordino roster pending --fleet lab"),),
    "roster approve": (("after comparing the fingerprint", "sordino roster approve pi-01 --fleet lab"),),
    "roster revoke": (("devices were stolen", "sordino roster revoke pi-01 pi-02 --fleet lab"),),
    "dealer init": (
        (
            "on the dealer's host",
            "sordino dealer init dealer --name dealer --fleet lab --operator-key HEX --broker broker.example:8883",
        ),
    ),
    "dealer run": (("deal", "sordino dealer run dealer"),),
    "plan show": (("what a job costs", "sordino plan show examples/boston-spdz.yaml"),),
    "privacy plan": (("what a job's privacy is worth", "sordino privacy plan examples/boston-dp.yaml"),),
}
SIM_EXAMPLES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "run": (
        ("a job in virtual time", "sordino-sim run examples/boston-fedavg.yaml --agents 20"),
        ("real processes and a real broker", "sordino-sim run examples/boston-fedavg.yaml --transport processes"),
    ),
    "fleet": (("put it on disk", "sordino-sim fleet examples/boston-fedavg.yaml fleet --agents 3"),),
    "completion": (("bash, in this shell", 'eval "$(sordino-sim completion bash)"'),),
}
FILES: Final = (
    ("fleet.yaml", "names, broker, and where run records are"),
    ("roster.yaml, roster.cbor", "who belongs to the fleet: the draft, and what the operator has signed"),
    ("operator.key, server.key", "keys; the first belongs on another machine"),
    ("runs.sqlite, runs/", "records and checkpoints of runs"),
)
ENVIRONMENT: Final = (
    ("SORDINO_FLEET", "the fleet directory, where --fleet is not given"),
    ("SORDINO_DATABASE", "run records in PostgreSQL, where --database is not given"),
    ("SORDINO_TRACEBACK", "1: show where a bug of ours happened"),
)


def first_sentence(text: str) -> str:
    """Without its full stop."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def explain(application: typer.Typer, examples: dict[str, tuple[tuple[str, str], ...]], *above: str) -> None:
    """Put examples and exit codes below the --help of every command of `application`."""
    application.info.epilog = EXIT_LINE
    for info in application.registered_commands:
        name = info.name or str(getattr(info.callback, "__name__", "")).replace("_", "-")
        # Its first sentence: left to itself, typer cuts it in the middle.
        info.short_help = first_sentence(inspect.getdoc(info.callback) or "")
        shown = examples.get(" ".join((*above, name)), ())
        # \\b keeps lines as they are.
        info.epilog = "\n\n".join([*("\b\n" + f"{what}:\n  {line}" for what, line in shown), EXIT_LINE])
    for group in application.registered_groups:
        if group.typer_instance is not None and isinstance(group.name, str):
            group.short_help = first_sentence(str(group.typer_instance.info.help))
            explain(group.typer_instance, examples, *above, group.name)

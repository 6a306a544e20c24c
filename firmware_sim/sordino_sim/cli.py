"""`sordino-sim`: run a job on a fleet that is made for it, or put such a fleet on disk.

stdout is for results (`--json`: one JSON object and nothing else), stderr for progress and errors; exit codes as
`sordino`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from sordino_common.errors import ConfigError
from sordino_server.cli import run_cli
from sordino_server.cli.completion import completion_command
from sordino_server.cli.manual import tree_of
from sordino_server.cli.output import print_table
from sordino_server.cli.version import add_version
from sordino_server.cli.words import SIM_EXAMPLES, SIM_SUMMARY, explain
from sordino_server.job import Job, load_job
from sordino_server.progress import ProgressView, result_line, size
from sordino_sim.sweep import Sweep, Trial, plan_trials, read_sweep, run_trials

app = typer.Typer(
    help="The whole fleet on this machine: the same agents and the same server, simulated or as processes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Transport(StrEnum):
    """What connects the fleet."""

    memory = "memory"
    mqtt = "mqtt"
    processes = "processes"


JobArgument = Annotated[Path, typer.Argument(help="The job file.")]
AgentsOption = Annotated[int | None, typer.Option("--agents", min=1, help="As --set simulation.agents=N.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Of training, data split, network and faults.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Instead of what the file says; any number of times."),
]
_NAMED: Final = 6  # agents of a fault, for people


@app.command()
def run(
    job: JobArgument,
    transport: Annotated[
        Transport,
        typer.Option(
            help="memory: virtual time and a simulated network. mqtt: a mosquitto of its own, in real time. processes: "
            "that, and a sordino-agent process per agent."
        ),
    ] = Transport.memory,
    agents: AgentsOption = None,
    seed: SeedOption = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="pi-zero2, pi3, pi4, pi5, server, or a mix: pi3:6,pi-zero2:4.")
    ] = None,
    faults: Annotated[Path | None, typer.Option("--faults", help="A fault schedule, instead of the job's own.")] = None,
    chaos: Annotated[
        int | None, typer.Option("--chaos", min=0, help="A fault schedule drawn from this seed, instead of one.")
    ] = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html and summary.json there.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Keep checkpoints and records there.")] = None,
    baseline: Annotated[bool, typer.Option(help="Compare with plain PyTorch on the same rows.")] = True,
    tamper: Annotated[
        str | None,
        typer.Option(
            "--tamper",
            help="A compute agent cheats: agent=1,step=3,gate=2,bit=17,what=opening (or mac, seed, commitment, "
            "correction, equivocation). It must be found: exit code 4.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="KEY.PATH=V1,V2,...",
            help="A run for each value, then a table; with --report a plot against the value.",
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="With --sweep: runs of each value, the seed counted up.")
    ] = 1,
) -> None:
    """Run a job on a simulated fleet."""
    changes = list(overrides or ())
    changes += [] if profile is None else [f"simulation.profile={profile!r}"]
    if sweep is not None:
        if tamper is not None or chaos is not None:
            raise ConfigError("--tamper and --chaos are for one run: leave out --sweep")
        _sweep(
            job,
            read_sweep(sweep, repeat=repeat),
            changes=_changes(changes, agents=agents, seed=seed),
            options={"transport": transport.value, "faults": faults},
            store=store,
            report=report,
            baseline=baseline,
            as_json=as_json,
            quiet=quiet,
        )
        return
    if repeat != 1:
        raise ConfigError("--repeat needs --sweep key.path=v1,v2,...; one job several times: --sweep train.seed=1,2,3")
    loaded = _load(job, agents=agents, seed=seed, overrides=changes)
    # Torch is only imported once the job is known to be right.
    from sordino_server.report import write_report
    from sordino_server.run import json_text
    from sordino_sim.runner import simulate
    from sordino_sim.tamper import read_tamper

    with ProgressView(quiet=quiet) as progress:
        done = simulate(
            loaded,
            transport=transport.value,
            faults=faults,
            chaos=chaos,
            observer=progress,
            store_folder=store,
            with_baseline=baseline,
            tamper=None if tamper is None else read_tamper(tamper),
        )
    if report is not None:
        write_report(replace(done.result, summary=done.summary), report)
        _note(f"report: {report / 'report.html'}")
    if as_json:
        _say(json_text(done.summary))
    else:
        for line in lines_of(done.summary):
            _say(line)


@app.command()
def fleet(
    job: JobArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    agents: AgentsOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Of the broker.")] = None,
) -> None:
    """Put a fleet for a job on disk: server, agents with keys and rows, a broker's configuration."""
    from sordino_sim.fleet_dir import check_empty, write_fleet
    from sordino_sim.scenario import scenario_of

    loaded = _load(job, agents=agents, seed=seed, overrides=overrides or ())
    check_empty(folder)
    made = write_fleet(scenario_of(loaded), folder, port=port)
    names = list(made.agents)
    _say(
        f"{len(names)} agents and a server in {folder}. Each in a terminal of its own, or in the background:\n"
        f"  mosquitto -c {made.broker_folder / 'mosquitto.conf'}\n"
        f"  for agent in {folder / 'agents'}/*; do sordino-agent run $agent & done\n"
        "Then:\n"
        f"  sordino agents --fleet {folder}\n"
        f"  sordino train {job} --fleet {folder}"
    )


app.command("completion")(completion_command(lambda: tree_of(app, "sordino-sim", summary=SIM_SUMMARY)))
explain(app, SIM_EXAMPLES)
add_version(app, "sordino-sim")


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    lines = [f"{summary['run']}: {result_line(summary)}"]
    lines.append(
        f"{summary['agents']} agents, {summary['rounds']} rounds, {summary['steps']} steps, up "
        f"{size(summary['bytes_up'])}, down {size(summary['bytes_down'])}, {summary['dropouts']} dropouts"
    )
    if summary["virtual_seconds"] is not None:
        profile = summary["simulated"]["profile"]
        board = profile if isinstance(profile, str) else ", ".join(f"{n} {name}" for name, n in profile.items())
        lines.append(f"on {board} it would take about {summary['virtual_seconds']:.1f} s (an estimate: profiles.py)")
    if summary["memory_per_agent_bytes"] is not None:
        lines.append(f"memory per agent here: {size(summary['memory_per_agent_bytes'])}")
    lines += [f"fault in round {fault['round']}: {_shortened(fault['what'])}" for fault in summary["faults"]]
    return lines


def _shortened(what: str) -> str:
    """Of many agents the first: all of them are in the JSON."""
    first, *others = what.split(", ")
    if len(others) < _NAMED:
        return what
    named, more = ", ".join([first, *others[: _NAMED - 1]]), len(others) + 1 - _NAMED
    return f"{named} and {more} more {others[-1].partition(' ')[2]}"


def _sweep(
    path: Path,
    sweep: Sweep,
    *,
    changes: Sequence[str],
    options: Mapping[str, Any],
    store: Path | None,
    report: Path | None,
    baseline: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """All runs, then the table (or JSON) of what they found; ends with the exit code of the worst."""
    trials = plan_trials(path, sweep, overrides=changes, with_baseline=baseline)
    from sordino_server.run import json_text
    from sordino_sim.runner import simulate
    from sordino_sim.sweep_view import SweepView, sweep_table, write_sweep

    with SweepView(sweep.key, len(trials), quiet=quiet) as view:

        def perform(trial: Trial) -> Mapping[str, Any]:
            folder = f"value-{sweep.values.index(trial.value) + 1}-seed-{trial.seed}"
            return simulate(
                trial.job,
                observer=view.observer(trial),
                store_folder=None if store is None else store / folder,
                with_baseline=trial.with_baseline,
                **options,
            ).summary

        swept, stopped = run_trials(sweep, trials, perform, told=view.told)
    if report is not None:
        write_sweep(swept, report)
        _note(f"report: {report / 'sweep.html'}")
    if as_json:
        _say(json_text(swept.to_json()))
    else:
        print_table(sweep_table(swept))
    if stopped is not None:
        raise stopped
    if swept.exit_code:
        raise typer.Exit(swept.exit_code)


def _load(path: Path, *, agents: int | None, seed: int | None, overrides: Sequence[str]) -> Job:
    return load_job(path, overrides=_changes(overrides, agents=agents, seed=seed))


def _changes(overrides: Sequence[str], *, agents: int | None, seed: int | None) -> list[str]:
    changes = list(overrides)
    changes += [] if agents is None else [f"simulation.agents={agents}"]
    changes += [] if seed is None else [f"train.seed={seed}", f"simulation.seed={seed}"]
    return changes


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> NoReturn:
    """The console script. Ends the process with the error's exit code."""
    raise SystemExit(run_cli(app, sys.argv[1:], program="sordino-sim"))


if __name__ == "__main__":
    main()

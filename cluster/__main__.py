"""`python -m cluster`: the entry points."""

import argparse
import errno
import sys
from collections.abc import Callable

STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # exit statuses, as a shell gives them


def _train(arguments: argparse.Namespace) -> int:
    from cluster.progress import print_summary
    from cluster.train import train
    from configs.load import prepare, preset_name

    config = prepare(arguments.preset, arguments.settings)
    if arguments.dry_run:
        from cluster.doctor.dry_run import dry_run

        return dry_run(config)
    summary = train(config, preset_name(arguments.preset))
    print_summary(summary)
    print(f"report: {config.run.dir}/{summary['name']}/report.html")
    if summary["status"] == "stopped":
        return STOPPED.get(summary["recovery"]["signal"], 130)
    return 0 if summary["status"] == "finished" else 1


def _stage(arguments: argparse.Namespace) -> int:
    from cluster.stages.stage import run_named
    from configs.load import prepare, preset_name

    config = prepare(arguments.preset, arguments.settings)
    summary = run_named(config, arguments.kind, preset_name(arguments.preset))
    print(f"{summary['name']}: {summary['status']} after {summary['steps']} steps", end="")
    print(f"; model: {summary['model']}" if summary["model"] else "")
    if summary["status"] == "stopped":
        return STOPPED.get(summary["signal"], 130)
    return 0 if summary["status"] == "finished" else 1


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.report.page import write

    print(write(Path(arguments.run)))
    return 0


def _scale(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.scale import ask

    print(ask(Path(arguments.run), arguments.actors))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from cluster.jobs.submit import submit

    return submit(
        arguments.preset, arguments.settings, arguments.address, arguments.install,
        not arguments.no_wait,
    )  # fmt: skip


def _dashboard(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.dashboard.server import serve

    serve(
        arguments.runs, Path(arguments.root), arguments.host, arguments.port, arguments.token,
        lambda text: print(text, flush=True),
    )  # fmt: skip
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.study.study import study

    print(study(
        arguments.name, Path(arguments.out) / "studies", arguments.quick, arguments.seeds,
        arguments.resume, arguments.parallel,
    ))  # fmt: skip
    return 0


def _pipeline(arguments: argparse.Namespace) -> int:
    from cluster.stages.judge import told
    from cluster.stages.pipeline import pipeline

    done = pipeline(arguments.preset, arguments.settings)
    if "evaluate" in done:
        print(told(done["evaluate"]))
    return 0 if done["train"]["status"] == "finished" else 1


def _evaluate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.stages.judge import evaluate, told

    print(told(evaluate(Path(arguments.run), arguments.settings)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    import_module(f"benchmarks.{arguments.name}").main(arguments.settings)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cluster.doctor import doctor

    return doctor.main(arguments.preset, arguments.settings)


def _label(arguments: argparse.Namespace) -> int:
    from cluster.stages import label

    return label.main(arguments.preset, arguments.settings)


def _advise(arguments: argparse.Namespace) -> int:
    from cluster.advise import advise

    return advise.main(arguments.source, arguments.settings)


Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser("python -m cluster", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help_: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(command=run)
        return sub

    _commands_on_presets(command)
    _commands_on_runs(command)
    _commands_on_methods(command)
    return top


def _preset(
    sub: argparse.ArgumentParser, help_: str = "a YAML file, or a name in configs/"
) -> None:
    """A preset, then overrides."""
    sub.add_argument("preset", metavar="PRESET", help=help_)
    _settings(sub)


def _settings(sub: argparse.ArgumentParser, help_: str = "override a setting") -> None:
    sub.add_argument("settings", nargs="*", metavar="key=value", help=help_)


def _commands_on_presets(command: Command) -> None:
    """What runs, checks or prepares a preset."""
    sub = command("train", _train, "run a preset")
    _preset(sub)
    sub.add_argument("--dry-run", action="store_true", help="only settings, and memory per GPU")
    stages = {"sft": "a policy on responses", "reward-model": "a reward model on preferences"}
    for name, what in stages.items():
        sub = command(name, _stage, f"train {what}, as a preset has it")
        sub.set_defaults(kind=name.replace("-", "_"))
        _preset(sub)
    sub = command("pipeline", _pipeline, "run a preset's stages in order, then train and evaluate")
    _preset(sub, "one that names its stages, as length_min")
    _preset(command("label", _label, "preference pairs from a data set's or a policy's responses"))
    sub = command("submit", _submit, "train, as a job on a Ray cluster")
    _preset(sub)
    sub.add_argument("--address", default="", metavar="URL", help="of Ray's dashboard")
    sub.add_argument("--install", action="store_true", help="pinned packages on the nodes, too")
    sub.add_argument("--no-wait", action="store_true", help="do not follow the run's output")
    sub = command("doctor", _doctor, "check that this machine can run a preset")
    sub.add_argument("preset", metavar="PRESET", nargs="?", default="bandit")
    _settings(sub)


def _commands_on_runs(command: Command) -> None:
    """What looks at runs that there are, or changes them."""
    sub = command("report", _report, "write report.html of a run")
    sub.add_argument("run", metavar="RUN_DIR")
    sub = command("scale", _scale, "more or fewer rollout actors for a run that goes on")
    sub.add_argument("run", metavar="RUN_DIR")
    sub.add_argument("--actors", type=int, required=True, metavar="N")
    sub = command("dashboard", _dashboard, "follow and compare runs on a live page")
    sub.add_argument("runs", nargs="*", metavar="RUN", help="folders or names; without: all")
    sub.add_argument("--runs", dest="root", default="runs", metavar="DIR", help="where runs are")
    sub.add_argument("--port", type=int, default=0, help="0: any free one, which is printed")
    sub.add_argument("--host", default="127.0.0.1", help="beyond loopback it needs a token")
    sub.add_argument("--token", default="", help="better in ONPOLICY_DASHBOARD_TOKEN: ps shows it")
    what = "the policy of a run beside π_ref: reward, length, KL, wins"
    sub = command("evaluate", _evaluate, what)
    sub.add_argument("run", metavar="RUN_DIR")
    _settings(sub, "samples=1000, any")


def _commands_on_methods(command: Command) -> None:
    """What compares methods, or recommends some."""
    sub = command("study", _study, "a figure of the paper, its claims decided")
    sub.add_argument("name", metavar="NAME", help="a name in configs/studies/, theory, or a file")
    sub.add_argument("--quick", action="store_true", help="minutes: fewer seeds, cells and updates")
    sub.add_argument("--seeds", type=int, default=0, metavar="N", help="runs of each cell")
    sub.add_argument("--resume", action="store_true", help="keep the trials that are finished")
    sub.add_argument("--parallel", type=int, default=0, metavar="N", help="trials at a time")
    sub.add_argument("--out", default="runs", metavar="DIR", help="results go to DIR/studies/NAME")
    sub = command("bench", _bench, "measure ours beside a named baseline, in one run")
    names = [
        "bandit", "kills", "learner", "methods", "overlap", "queue", "reward", "soak",
        "startup", "studies", "trl", "weights",
    ]  # fmt: skip
    sub.add_argument("name", choices=names)
    _settings(sub, "a setting of the bench")
    sub = command("advise", _advise, "say which methods the paper recommends for a problem")
    sub.add_argument("source", metavar="PRESET|DATASET", help="a preset, or a .jsonl or .parquet")
    _settings(sub, "samples=2000, lower=, upper=, any")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what is wrong with its input is one line on stderr, exit status 2."""
    top = parser()
    parsed, more = top.parse_known_args(arguments)  # settings may stand after options, too
    if more and (not hasattr(parsed, "settings") or any(word.startswith("-") for word in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        parsed.settings += more
    try:
        return parsed.command(parsed)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

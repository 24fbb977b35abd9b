"""A study's trials, several at once in processes that are kept, beside the same trials one by one.

Three ways in turn, each over trials of its own seeds: `commands` (`python -m cluster train`, a new
process and Ray for each: what one does without a study), `one` (a study, one trial at a time) and
`several` (a study, as many as there are cores). A study's processes are started before the clock.
CPU use is that of the whole machine while trials wait for a place.

Settings: repeats=2, trials=6 (a turn of a study), commands=1 (a turn), updates=300,
parallel=0 (as many as cores).
"""

import os
import tempfile
import textwrap
import time
from pathlib import Path

import psutil

from benchmarks import results
from benchmarks.outside import OutsideRun, own_settings
from cluster import connection
from cluster.study import spec
from cluster.study.trial import Trial
from cluster.study.trials import Trials
from configs.errors import ConfigError
from configs.schema import ClusterConfig
from reward_server.service import start_serve

DEFAULTS = {"repeats": 2, "trials": 6, "commands": 1, "updates": 300, "parallel": 0}
LIMIT_SECONDS = 600.0


class Machine:
    """Busy CPU seconds of the whole machine, read when a study says a line."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []  # time, busy seconds of all cores

    def say(self, _: str = "") -> None:
        """Read it now; takes the line that a study says about each trial."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        self.seen.append((time.monotonic(), sum(times[:8]) - idle))

    def busy(self, last: int) -> float:
        """Share of all cores from the first reading to the one numbered `last`."""
        (start, before), (end, after) = self.seen[0], self.seen[last]
        return (after - before) / (end - start) / (os.cpu_count() or 1)


def main(overrides: list[str]) -> None:
    """Print trials per minute each way, their ratios and how busy the machine was."""
    own, rest = own_settings(overrides, DEFAULTS)
    parallel = own["parallel"] or len(os.sched_getaffinity(0))
    if own["trials"] <= parallel:
        raise ConfigError("trials", own["trials"], f"none waits with {parallel} at once",
                          f"set trials={2 * parallel + 1} or more")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        study = _study(root, own["updates"], rest)
        rows = _race(study, root, own, parallel)
    print(_report(rows, parallel))
    results.write("studies", {"settings": own | {"parallel": parallel}, "rows": rows})


def _study(root: Path, updates: int, settings: list[str]) -> spec.Study:
    """One cell of the bandit, its seeds the trials. ConfigError for settings that cannot be."""
    path = root / "bench.yaml"
    given = [f"learner.updates={updates}", *settings]
    path.write_text(
        textwrap.dedent(f"""
        title: Trials to be counted
        preset: bandit_best_of_n
        settings: {given}
        axes: {{reward: {{R1: [reward.centre=70]}}}}
        seeds: 1
    """)
    )
    return spec.load(str(path))


def _race(
    study: spec.Study, root: Path, own: dict[str, int], parallel: int
) -> list[dict[str, float]]:
    rows = []
    for repeat in range(own["repeats"]):
        seeds = range(1000 * (repeat + 1), 1000 * (repeat + 1) + own["trials"])
        row = {"commands_per_min": _commands(study, root, seeds[: own["commands"]])}
        with connection.connected(ClusterConfig()):
            start_serve(0)
            for way, most in (("one", 1), ("several", parallel)):
                row |= _counted(way, study, root / f"{way}-{repeat}", most, seeds)
        rows.append(row)
    return rows


def _commands(study: spec.Study, root: Path, seeds: range) -> float:
    """Trials per minute as commands, one after another."""
    started = time.monotonic()
    for seed in seeds:
        settings = [*study.settings_of(study.cells[0]), f"seed={seed}", "checkpoint.every=0"]
        run = OutsideRun(study.preset, settings, root / "commands", f"seed-{seed}")
        if run.finish(LIMIT_SECONDS)["status"] != "finished":
            raise RuntimeError(f"the run of seed {seed} did not finish")
    return 60 * len(seeds) / (time.monotonic() - started)


def _counted(
    way: str, study: spec.Study, folder: Path, most: int, seeds: range
) -> dict[str, float]:
    """Trials per minute of a study, and the machine's use, once its processes are there."""
    machine = Machine()
    trials = Trials(study, folder, most, machine.say)
    (cell,) = study.cells
    try:
        _done(trials, [Trial(cell, seed, updates=10) for seed in range(most)])
        machine.seen.clear()
        machine.say()
        _done(trials, [Trial(cell, seed) for seed in seeds])
    finally:
        trials.end()
    seconds = machine.seen[-1][0] - machine.seen[0][0]
    waiting = len(seeds) - most  # once so many are over, every place is taken and none waits
    return {f"{way}_per_min": 60 * len(seeds) / seconds, f"{way}_busy": machine.busy(waiting)}


def _done(trials: Trials, which: list[Trial]) -> None:
    for outcome in trials.run(which, "bench"):
        if outcome.failure:
            raise RuntimeError(f"{outcome.trial}: {outcome.failure}")


def _report(rows: list[dict[str, float]], parallel: int) -> str:
    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    ways = {"commands": "commands, one by one", "one": "a study, one at a time",
            "several": f"a study, {parallel} at a time"}  # fmt: skip
    lines = [
        f"{words:24} {results.spread(column(f'{way}_per_min'))} trials/min"
        for way, words in ways.items()
    ]
    for way in ("one", "several"):
        busy = [100 * share for share in column(f"{way}_busy")]
        lines.append(f"{ways[way]:24} machine busy {results.spread(busy, 0)}% while trials wait")
    for way in ("commands", "one"):
        ratios = results.ratios(column("several_per_min"), column(f"{way}_per_min"))
        lines.append(f"studies: {parallel} at a time / {ways[way]} = {results.spread(ratios)}")
    return "\n".join(lines)

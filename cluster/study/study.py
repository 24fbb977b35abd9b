"""`python -m cluster study`: search, trials, results, figures and claims of one study."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from cluster import connection
from cluster.run_directory import describe_environment
from cluster.stages import pipeline
from cluster.study import claims, figures, page, results, spec, theory
from cluster.study.search import combination, search
from cluster.study.trial import Trial
from cluster.study.trials import Trials
from configs.errors import ConfigError
from configs.schema import ClusterConfig
from reward_server.service import start_serve

CORES_PER_TRIAL = 1  # learner and actor take turns in lockstep


def study(
    name: str, folder: Path, quick: bool = False, seeds: int = 0, resume: bool = False,
    parallel: int = 0,
) -> Path:  # fmt: skip
    """Run a study; returns the folder with its results.

    folder: where studies are written, NAME/ for this one. seeds, parallel: 0 for the study's own
    number, and as many trials as there are cores. resume: keep the trials that are finished.
    ConfigError before the first trial for a study that cannot be run.
    """
    target = folder / Path(name).stem
    if target.exists() and any(target.iterdir()) and not resume:
        raise ConfigError("study", name, f"there are results in {target}",
                          "go on with --resume, or remove them")  # fmt: skip
    if name == "theory":
        _tell(theory.run(target, theory.QUICK if quick else theory.DRAWS))
        return target
    what = spec.load(name, quick, seeds)
    target.mkdir(parents=True, exist_ok=True)
    with connection.connected(ClusterConfig()):
        _run_stages(what, folder.parent)
        start_serve(0)
        most = parallel or _cores() // CORES_PER_TRIAL
        trials = Trials(what, target / "trials", most, _say, folder.parent)
        try:
            table = _run(what, trials, target)
        finally:
            trials.end()
    write(what, table, target)
    return target


def _run_stages(what: spec.Study, root: Path) -> None:
    """The stages before training that its cells name, each once, under `root`."""
    ready: set[Path | None] = {None}
    for cell in what.cells:
        config = what.prepare(cell, f"run.dir={root}")
        wanted = set(pipeline.directories(config).values())
        if not wanted <= ready:
            pipeline.run_stages(config)
            ready |= wanted


def _run(what: spec.Study, trials: Trials, target: Path) -> pd.DataFrame:
    rates, rows = search(what, trials)
    if rows:
        _write_json(target / "search.json", {"rates": rates, "runs": rows})
    every = [
        Trial(cell, seed, rates.get(combination(what, cell)))
        for seed in range(what.seeds)
        for cell in what.cells
    ]
    outcomes = trials.run(every, what.name)
    _write_json(target / "environment.json", describe_environment())
    for outcome in outcomes:
        if outcome.failure:
            _say(f"without {outcome.trial}: {outcome.failure}")
    return results.frame(outcomes)


def write(what: spec.Study, table: pd.DataFrame, target: Path) -> None:
    """results.parquet, figure.png, claims.json and page.html."""
    table.to_parquet(target / "results.parquet")
    figures.draw(what, table, target / "figure.png")
    decided = claims.decide(what, table)
    page.write(decided, target, what, table, " ".join(["python -m cluster", *sys.argv[1:]]))
    _tell(decided)


def _tell(decided: list[dict[str, Any]]) -> None:
    for claim in decided:
        _say(f"{claim['verdict']}: {claim['name']} ({claim['evidence']})")


def _cores() -> int:
    """Of every node of the cluster; of this machine where the cluster is our own."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        return int(sum(node["Resources"].get("CPU", 0) for node in nodes))
    return len(os.sched_getaffinity(0))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stderr)

"""A run whose rollout actors withhold weights, once the file that WITHHOLD names is there.

`python -m tests.integration.withheld train PRESET …` is `python -m cluster …` with such actors.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.rollout import Version
from cluster.__main__ import main
from cluster.crew import Crew
from cluster.rollout_worker import RolloutWorker


class WithholdingWorker(RolloutWorker):
    """Its engine announces a version that it was given, and goes on with the weights it has."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.engine is not None
        engine, load, file = self.engine, self.engine.load, Path(os.environ["WITHHOLD"])

        def forgets(weights: np.ndarray, version: Version) -> None:
            if file.exists():
                engine.version = version
            else:
                load(weights, version)

        engine.load = forgets


def spawn(
    crew: Crew, target: str, *arguments: Any, _spawn: Any = Crew.spawn, **options: Any
) -> Any:
    """Withholding workers for rollout workers."""
    if target == "cluster.rollout_worker:RolloutWorker":
        target = "tests.integration.withheld:WithholdingWorker"
    return _spawn(crew, target, *arguments, **options)


if __name__ == "__main__":
    Crew.spawn = spawn
    sys.exit(main())

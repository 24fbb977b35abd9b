"""Reverb as `benchmarks.queue` sees it: its environment, and a process that answers commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

ENVIRONMENT = FOLDER / "reverb-env"
PACKAGE = "dm-reverb[tensorflow]==0.14.0"
INSTALL_SECONDS = 900.0


class Reverb:
    """`benchmarks.queue_reverb` in its own Python."""

    def __init__(self, python: Path) -> None:
        variables = {"PYTHONPATH": str(Path(__file__).parent.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.log = (FOLDER / "reverb.log").open("wb")
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.queue_reverb"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **variables}, text=True,
        )  # fmt: skip
        self._answer()

    def ask(self, **job: Any) -> float:
        """Rollouts per second, see `benchmarks.queue_reverb.measure`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Reverb side ended; {self.log.name} says why")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30.0)
        self.log.close()


def reverb() -> Reverb | None:
    """The Reverb side, its environment made if it is missing; None, and one line, without one."""
    python = ENVIRONMENT / "bin" / "python"
    try:
        if not (ENVIRONMENT / "whole").exists():
            print(f"making {ENVIRONMENT} for {PACKAGE}, some minutes", flush=True)
            ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
                [str(python), "-m", "pip", "install", "--quiet", PACKAGE],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
            (ENVIRONMENT / "whole").touch()
        return Reverb(python)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        why = getattr(error, "stderr", None) or str(error).encode()
        print(f"NO REVERB: its side is left out: {why.decode().strip().splitlines()[-1]}")
        return None

"""Trackers of `run.trackers`: other programs that get a run's metrics beside metrics.jsonl.

TensorBoard reads RUN/tensorboard: `tensorboard --logdir runs`. Its files are written with its own
package; torch's writer would bring torch into the driver.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

from cluster.metrics import Tracker, numbers
from configs.errors import ConfigError
from configs.schema import Config


def check(config: Config) -> None:
    """ConfigError where a tracker's package is missing."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            problem = f"the package {name} is not installed"
            fix = f"pip install {name}, or leave it out"
            raise ConfigError("run.trackers", config.run.trackers, problem, fix)


def begin(config: Config, directory: Path) -> list[Tracker]:
    """The trackers of a run, writing into its directory."""
    made = {"tensorboard": TensorBoard}
    return [made[name](directory / name) for name in config.run.trackers]


class TensorBoard:
    """Event files with every number of each line, single precision, by its optimizer step."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder), flush_secs=10)

    def add(self, line: dict[str, Any]) -> None:
        """Take the next step's line."""
        values = [
            self._summary.Summary.Value(tag=name, simple_value=value)
            for name, value in numbers(line)
            if name != "step"
        ]
        summary = self._summary.Summary(value=values)
        self._send(line["step"], summary=summary)

    def cut(self, step: int) -> None:
        """TensorBoard forgets what it has of later steps when it reads of a start."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._send(step + 1, session_log=start)

    def _send(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        """Write out what is held back."""
        self._writer.close()

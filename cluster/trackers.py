"""Trackers of `run.trackers`: other programs that get a run's metrics beside metrics.jsonl.

TensorBoard reads RUN/tensorboard: `tensorboard --logdir runs`. Its files are written with its own
package; torch's writer would bring torch into the driver.

Weights & Biases writes RUN/wandb, and nothing leaves the machine until `wandb sync` is asked to;
with WANDB_MODE=online in the environment, and its key, it goes there as it comes.

Trackio keeps its runs in a folder of its own, TRACKIO_DIR or one in the user's cache, which
`trackio show --project onpolicy` opens. With TRACKIO_SPACE_ID or TRACKIO_SERVER_URL in the
environment they go there.
"""

import contextlib
import contextvars
import importlib.util
import io
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.metrics import Tracker, numbers
from configs.errors import ConfigError
from configs.load import to_yaml
from configs.schema import Config

MODES = ("offline", "online", "disabled")  # of W&B, the first unless WANDB_MODE says otherwise


def check(config: Config) -> None:
    """ConfigError where a tracker's package is missing, or W&B is to run in a way unknown to us."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            problem = f"the package {name} is not installed"
            fix = f"pip install {name}, or leave it out"
            raise ConfigError("run.trackers", config.run.trackers, problem, fix)
    mode = os.environ.get("WANDB_MODE", MODES[0])
    if "wandb" in config.run.trackers and mode not in MODES:
        fix = f"take one of {', '.join(MODES)}"
        raise ConfigError("run.trackers", config.run.trackers, f"WANDB_MODE={mode} is unknown", fix)


def begin(config: Config, directory: Path) -> list[Tracker]:
    """The trackers of a run, writing into its directory."""
    kinds: dict[str, Callable[[Path, Config], Tracker]]
    kinds = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}
    return [kinds[name](directory / name, config) for name in config.run.trackers]


class TensorBoard:
    """Event files with every number of each line, single precision, by its optimizer step."""

    def __init__(self, folder: Path, config: Config) -> None:
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


class WeightsAndBiases:
    """A run of the project `onpolicy` with every number of each line, drawn over `step`.

    It begins with the first line, so that what W&B refuses is the failure of a run, and stated. A
    run that goes on has the same id. What is logged stays: a step that was undone stands beside the
    one that took its place.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self._run: Any = None

    def _begin(self) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_save_requirements=False,
        )  # fmt: skip # the run's own files say all of that
        mode: Any = os.environ.get("WANDB_MODE", MODES[0])
        run = wandb.init(
            project="onpolicy", name=self.folder.parent.name, id=_id(self.folder),
            resume="allow", dir=self.folder, mode=mode,
            config=yaml.safe_load(to_yaml(self.config)), settings=quiet,
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
        return run

    def add(self, line: dict[str, Any]) -> None:
        """Take the next step's line."""
        self._run = self._run or self._begin()
        self._run.log(dict(numbers(line)))

    def cut(self, step: int) -> None:
        """Nothing: what is logged stays."""

    def close(self) -> None:
        """Write out what is held back: W&B's own process ends, since `finish` does not wait."""
        if self._run is not None:
            import wandb

            self._run.finish()
            wandb.teardown()


class Trackio:
    """A run of the project `onpolicy` with every number of each line, at its optimizer step.

    It is named by the run and an id, by which a run that goes on finds its own. What is logged
    stays, as for W&B.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self._run: Any = None

    def add(self, line: dict[str, Any]) -> None:
        """Take the next step's line."""
        self._run = self._run or self._begin()
        self._run.log({k: v for k, v in numbers(line) if k != "step"}, step=line["step"])

    def _begin(self) -> Any:
        name = f"{self.folder.parent.name} {_id(self.folder)}"
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            apart = contextvars.copy_context()  # it finishes the run of its context, also at exit
            return apart.run(
                trackio.init, project="onpolicy", name=name, resume="allow", embed=False,
                config=yaml.safe_load(to_yaml(self.config)), auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def cut(self, step: int) -> None:
        """Nothing: what is logged stays."""

    def close(self) -> None:
        """Write out what is held back."""
        if self._run is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                self._run.finish()


def _id(folder: Path) -> str:
    """The id of a run's tracker, made at first."""
    folder.mkdir(exist_ok=True)
    known = folder / "id"
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return known.read_text(encoding="utf-8")

"""Connecting to Ray: the cluster that is named, or one of our own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from configs.schema import ClusterConfig

LOGICAL_CPUS = 16  # of our own cluster: processes share cores, whose threads are capped instead


def environment(config: ClusterConfig) -> dict[str, str]:
    """Environment variables of every process of a run."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        "MKL_NUM_THREADS": str(config.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Serve's routers and replicas, which count their requests ten times a second otherwise.
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # Its controller, which asks Ray's GCS for all there is ten times a second otherwise: with
        # what that costs there, 4% of a core.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    }


@contextmanager
def connected(config: ClusterConfig) -> Iterator[bool]:
    """Ray, connected while the block runs; True where the cluster is our own and ends with it.

    A caller that is connected already stays so.
    """
    if ray.is_initialized():
        yield False
        return
    variables = environment(config)
    os.environ.update(variables)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not config.dashboard:  # whose list of past tasks would fill 250 MB within an hour
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    # Ray's log monitor looks for new files ten times a second where they are few; none is shown.
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "10")
    if config.metrics_seconds:
        report = str(max(1000, round(1000 * config.metrics_seconds)))
        os.environ.setdefault("RAY_metrics_report_interval_ms", report)
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)
    else:
        _keep_token()
        try:
            ray.init(
                address="local", num_cpus=LOGICAL_CPUS, include_dashboard=config.dashboard, **quiet
            )
        finally:
            _keep_token()  # if there was none before
    try:
        yield not address
    finally:
        ray.shutdown()


def _keep_token() -> None:
    """Ray's token, which Ray 2.60 writes for everyone to read, is read by this user only."""
    with suppress(OSError, RuntimeError):  # without a home of ours the token is elsewhere
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o600)

"""Processes that a test's run has started, found from the outside."""

import contextlib
import subprocess
import time
from collections.abc import Callable

import psutil


def vllm_engines(run: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> list[psutil.Process]:
    """vLLM's engine processes below a run, as one look finds them; processes come and go.

    vLLM's workers are below an engine. An engine that cannot write its title, since the first
    variable of its environment was changed before, is one that multiprocessing spawned.
    """
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.parent()
            if _is_vllms(process) and parent is not None and not _is_vllms(parent):
                found.append(process)
    return found


def _is_vllms(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline())
    return "VLLM::" in command or "multiprocessing.spawn" in command


def kill_the_vllm_engine(
    run: "subprocess.Popen[str] | subprocess.Popen[bytes]", ready: Callable[[], bool]
) -> None:
    """Kill a run's one vLLM engine process as soon as `ready()`; AssertionError after 300 s."""
    until = time.monotonic() + 300
    while not ready() or not (found := vllm_engines(run)):
        assert run.poll() is None and time.monotonic() < until, "no run with an engine process"
        time.sleep(0.1)
    (engine,) = found
    engine.kill()

"""Ray actors whose code is imported where they run, so that the driver starts without torch."""

import gc
from importlib import import_module
from typing import Any

import ray


class Host:
    """A process with one object in it; `call` calls its methods."""

    def __init__(self, target: str, *arguments: Any) -> None:
        module, name = target.split(":")
        gc.disable()  # what a module makes at its import stays: to look through it is for nothing
        self.kind = getattr(import_module(module), name)
        gc.freeze()
        gc.enable()
        self.target = self.kind(*arguments)
        self.failure: Exception | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns; object references among the arguments arrive as
        values, in lists as references."""
        if self.failure:
            raise self.failure
        return getattr(self.target, method)(*arguments)

    def rest(self) -> None:
        """Let go of the object, by its `leave` if it has one."""
        if leave := getattr(self.target, "leave", None):
            leave()
        self.target = None
        gc.collect()

    def build(self, *arguments: Any) -> None:
        """An object anew, in a process that rests. Where that fails, `call` says why."""
        self.failure = None
        try:
            self.target = self.kind(*arguments)
        except Exception as error:
            self.failure = error


def spawn(target: str, *arguments: Any, **options: Any) -> Any:
    """A Ray actor holding `module:Class` of these arguments; `.call.remote("method", …)`.

    Ray's logs and the process's title have the class's name. options: those of Ray's actors
    (num_cpus, num_gpus, …).
    """
    named = type(target.split(":")[1], (Host,), {})
    return ray.remote(named).options(**options).remote(target, *arguments)

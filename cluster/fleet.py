"""The fleet of rollout actors: started, watched, restarted; what they were leased goes back."""

import time
from collections.abc import Callable
from typing import Any

import ray

from actors.actor import RewardClient
from cluster.crew import Crew
from cluster.placement import Placement, actor
from cluster.restarts import Restarts, reason
from configs.schema import Config
from configs.schema_vllm import Transfer

CALLS_AT_ONCE = 4  # of an actor or rank that weights are pushed to or from while it runs


def pushes(config: Config) -> bool:
    """Whether the learner pushes weights to the actors' GPUs."""
    return config.rollout.transfer is not Transfer.host


SILENCE = 10.0  # seconds between lines while actors start
ROOM_SECONDS = 1.0  # between looks whether an actor has room


class FleetError(RuntimeError):
    """Actors that do not start, or fail more often than `limits.actor_restarts` allows."""


class Fleet:
    """Starts so many actors and keeps that many alive, each where there is room for it."""

    def __init__(
        self, config: Config, crew: Crew, placement: Placement, actors: int, offline_path: str,
        fault_folder: str,
    ) -> None:  # fmt: skip
        self.config, self.crew, self.placement = config, crew, placement
        self.offline_path, self.fault_folder = offline_path, fault_folder
        limits = config.limits
        self.restarts = Restarts(
            "rollout actors", "limits.actor_restarts", limits.actor_restarts, limits.backoff_seconds
        )
        self.on_restart: Callable[[dict[int, Any]], None] = lambda workers: None
        self.workers = {index: self._start(index) for index in range(actors)}
        self.running: dict[Any, int] = {}
        self.spent: dict[int, dict[str, float]] = {}  # what actors that came back said, by part
        self.started: dict[int, float] = {}  # when an actor was set to work
        self.known: dict[int, float] = {}  # when the queue last knew of it
        self.due: dict[int, float] = {}  # when an actor is to be started, again or at all
        self._without_room: set[int] = set()  # of those due, said already

    def _start(self, index: int) -> Any:
        resources = self.config.cluster
        return self.crew.spawn(
            "cluster.rollout_worker:RolloutWorker", self.config, index, self.offline_path,
            self.fault_folder, num_cpus=resources.actor_cpus, num_gpus=resources.actor_gpus,
            max_concurrency=CALLS_AT_ONCE if pushes(self.config) else 1,
            **self.placement.options(actor(index)),
        )  # fmt: skip

    def wait_ready(self, say: Callable[[str], None]) -> None:
        """Until every actor has built its engine; what keeps one from it is raised at once.

        say: takes a line about each, and one now and then while it starts. FleetError names the
        actors that are not there after `limits.startup_seconds`.
        """
        started, seconds = time.monotonic(), self.config.limits.startup_seconds
        calls = {worker.call.remote("ready"): index for index, worker in self.workers.items()}
        late = list(calls)
        while late and (spent := time.monotonic() - started) < seconds:
            done, late = ray.wait(late, num_returns=1, timeout=min(SILENCE, seconds - spent))
            ray.get(done)
            spent = time.monotonic() - started
            waiting = ", ".join(str(calls[call]) for call in late)
            if spent > SILENCE:
                for call in done:
                    say(f"rollout actor {calls[call]} is ready after {spent:.0f} s more")
                if late and not done:
                    say(f"rollout actors still starting after {spent:.0f} s more: {waiting}")
        if late:
            raise FleetError(f"rollout actors not ready after {seconds:.0f} s: {waiting}")

    def meet(self, rewards: RewardClient) -> None:
        """Have the actors open their way to the reward service while the learner still starts;
        not waited for, but `ready` comes after it."""
        for worker in self.workers.values():
            worker.call.remote("meet", rewards)

    def serve(self, queue: Any, rewards: RewardClient) -> None:
        """Set all actors to work."""
        self.queue, self.rewards = queue, rewards
        for index in self.workers:
            self._run(index)

    def _run(self, index: int) -> None:
        self.started[index] = self.known[index] = time.monotonic()
        call = self.workers[index].call.remote("run", self.queue, self.rewards)
        self.running[call] = index

    def watch(self, unheard: dict[int, float]) -> list[str]:
        """End actors that hang, restart those that died; returns a line about each.

        unheard: seconds since each actor that the queue knows took its oldest lease, or was heard
        of at all. RestartsUsedUp when it is too often.
        """
        lines = []
        for call in _done(self.running, 0.0):
            index = self.running.pop(call)
            try:
                self.spent[index] = ray.get(call)
            except ray.exceptions.RayError as error:
                lines.append(self._restart(index, reason(error)))
        now, limits = time.monotonic(), self.config.limits
        for call, index in list(self.running.items()):
            if index in unheard:
                self.known[index] = now
                silent, limit = unheard[index], limits.lease_seconds
            else:  # it starts, or the queue does, which then hears of it at its next call
                silent, limit = now - self.known[index], limits.startup_seconds
            if min(silent, now - self.started[index]) > limit:
                del self.running[call]
                lines.append(self._restart(index, f"no word of it for {limit:g} s"))
        return lines + self._start_due()

    def _start_due(self) -> list[str]:
        """Start the actors whose time has come; those without room are looked at again."""
        lines = []
        for index in [i for i, when in self.due.items() if when <= time.monotonic()]:
            if not self.placement.there(actor(index)):
                if index not in self._without_room:
                    missing = self.placement.missing(actor(index))
                    lines.append(f"the run goes on without rollout actor {index}: {missing}")
                self._without_room.add(index)
                self.due[index] = time.monotonic() + ROOM_SECONDS
                continue
            if index in self._without_room:
                self._without_room.remove(index)
                lines.append(f"there is room for rollout actor {index}")
            del self.due[index]
            self.workers[index] = self._start(index)
            self.on_restart({index: self.workers[index]})
            self._run(index)
        return lines

    def scale(self, actors: int) -> str:
        """Grow or shrink to so many actors, 0 … n − 1; returns a line about it.

        What those that go had leased is issued again under the same ids. Whoever comes starts as
        after a restart, once it has room.
        """
        there = {*self.workers, *self.due}
        going = sorted(index for index in there if index >= actors)
        for index in going:
            self._end(index)
        coming = sorted(set(range(actors)) - there)
        for index in coming:
            self.placement.add(index)
            self.due[index] = time.monotonic()
        call = self.queue.expect.remote(list(range(actors)))
        released = ray.get(call, timeout=self.config.limits.wait_seconds)
        change = (
            f"{len(coming)} more" if coming else f"{len(going)} fewer" if going else "as before"
        )
        return f"rollout actors: {actors} ({change}), {released} lease(s) issued again"

    def _end(self, index: int) -> None:
        """End an actor that is not wanted any more, and give its room back."""
        if (worker := self.workers.pop(index, None)) is not None:
            ray.kill(worker)
        self.running = {call: i for call, i in self.running.items() if i != index}
        self.due.pop(index, None)
        self._without_room.discard(index)
        self.placement.leave(actor(index))

    def _restart(self, index: int, why: str) -> str:
        """End an actor for good, give its leases back, and note when the next one starts."""
        pause = self.restarts.count(why)
        ray.kill(self.workers[index])
        released, quarantined = ray.get(
            self.queue.release.remote(index), timeout=self.config.limits.wait_seconds
        )
        self.due[index] = time.monotonic() + pause
        line = f"rollout actor {index} restarted, {released} lease(s) issued again: {why}"
        if quarantined:
            line += f"; its prompt at position {quarantined[0]} is quarantined"
        return line

    def finish(self, seconds: float) -> dict[int, dict[str, float]]:
        """Wait for actors to see that the run is over; seconds spent per part, by actor."""
        calls, spent = dict(self.running), dict(self.spent)
        for call in _done(calls, seconds):
            try:
                spent[calls[call]] = ray.get(call)
            except ray.exceptions.RayError:
                continue
        return spent


def _done(calls: dict[Any, int], seconds: float) -> list[Any]:
    """Those of the calls that are done within the time."""
    if not calls:
        return []
    done: list[Any] = ray.wait(list(calls), num_returns=len(calls), timeout=seconds)[0]
    return done

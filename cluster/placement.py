"""Where the parts of a run go: room that Ray reserves for them, and what a cluster lacks for it.

Every part that is to have CPUs or GPUs gets a placement group: the learner's ranks one together,
all or none; each rollout actor one of its own, so that actors come and go one by one; the
evaluator one. Serve places the reward's replicas, after a look whether there is room. A part that
reserves nothing goes wherever Ray puts it, as all parts of the bandit do.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.choices import Spread
from configs.schema import Config

SILENCE = 5.0  # seconds of waiting before it is said what is missing
POLL_SECONDS = 0.1
NODES_TOLD = 6  # in a line


class NoPlace(RuntimeError):
    """The cluster has no room for a part; says for which, and what each node lacks."""


@dataclass(frozen=True)
class Need:
    """What a part reserves: `number` times the bundle (CPU, GPU), on nodes with the label `on`."""

    part: str
    bundle: dict[str, float]
    number: int = 1
    on: str = ""
    spread: Spread = Spread.pack

    @property
    def labels(self) -> dict[str, str]:
        """As Ray's label selectors have it."""
        key, _, value = self.on.partition("=")
        return {key: value} if key else {}

    def __str__(self) -> str:
        each = " each" if self.number > 1 else ""
        wants = [" ".join(f"{name} {n:g}" for name, n in self.bundle.items()) + each]
        wants += [self.on] if self.on else []
        strict = self.number > 1 and self.spread is not Spread.pack
        wants += [f"cluster.nodes.ranks={self.spread.name}"] if strict else []
        return f"{self.part} ({', '.join(wants)})"


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    name: str
    labels: dict[str, str]
    total: dict[str, float]
    free: dict[str, float]

    def room(self, need: Need) -> int:
        """How many of the bundles would fit."""
        if any(self.labels.get(key) != value for key, value in need.labels.items()):
            return 0
        return int(min((self.free.get(r, 0.0) + 1e-6) // n for r, n in need.bundle.items()))

    def describe(self, need: Need) -> str:
        """What it has of what is needed."""
        if need.on and not all(self.labels.get(k) == v for k, v in need.labels.items()):
            return f"{self.name} is not {need.on}"
        has = [f"{r} {self.free.get(r, 0):g} of {self.total.get(r, 0):g} free" for r in need.bundle]
        return f"{self.name} has {', '.join(has)}"


def needs(config: Config, actors: int) -> dict[str, Need]:
    """What each part is to have reserved, by its key: `learner`, `actor 0` …, `evaluator`,
    `reward`. Parts that reserve nothing are not in it."""
    c, nodes, ranks = config.cluster, config.cluster.nodes, config.learner.ranks
    if c.colocated:  # one bundle, so that the shares are of one GPU
        cpus = c.learner_cpus + c.actor_cpus + c.evaluator_cpus
        gpus = c.learner_gpus + c.actor_gpus + c.evaluator_gpus
        found = {"learner": Need("learner, actor and evaluator", _of(cpus, gpus), 1, nodes.learner)}
    else:
        part = "the learner" if ranks == 1 else f"{ranks} learner ranks"
        learner = _of(c.learner_cpus, c.learner_gpus)
        found = {"learner": Need(part, learner, ranks, nodes.learner, nodes.ranks)}
        found |= {actor(index): actor_need(config, index) for index in range(actors)}
        evaluator = _of(c.evaluator_cpus, c.evaluator_gpus)
        found["evaluator"] = Need("the evaluator", evaluator, 1, nodes.evaluator)
    replicas, scorer = config.reward.replicas, _of(c.reward_cpus, c.reward_gpus)
    found["reward"] = Need(f"reward.replicas={replicas}", scorer, replicas, nodes.reward)
    return {key: need for key, need in found.items() if need.bundle}


def actor(index: int) -> str:
    """The key of a rollout actor."""
    return f"actor {index}"


def actor_need(config: Config, index: int) -> Need:
    """What a rollout actor is to have; its bundle may be empty."""
    c = config.cluster
    return Need(f"rollout actor {index}", _of(c.actor_cpus, c.actor_gpus), on=c.nodes.actors)


def scorer_options(config: Config) -> dict[str, Any]:
    """Ray's options for each of the reward's replicas, which Serve places."""
    c = config.cluster
    labels = Need("", {}, on=c.nodes.reward).labels
    options = {"num_cpus": c.reward_cpus, "num_gpus": c.reward_gpus}
    return options | ({"label_selector": labels} if labels else {})


def _of(cpus: float, gpus: float) -> dict[str, float]:
    return {name: n for name, n in (("CPU", cpus), ("GPU", gpus)) if n}


def lacking(need: Need, nodes: list[Node]) -> str:
    """Why there is no room, in one line: how many would fit, and what each node has."""
    rooms = [node.room(need) for node in nodes]
    if need.spread is Spread.strict_pack:
        fit = max(rooms, default=0)
    elif need.spread is Spread.strict_spread:
        fit = sum(room > 0 for room in rooms)
    else:
        fit = sum(rooms)
    told = [node.describe(need) for node in nodes[:NODES_TOLD]]
    told += [f"{len(nodes) - NODES_TOLD} more nodes"] if len(nodes) > NODES_TOLD else []
    number = f"for {fit} of {need.number}" if need.number > 1 and fit < need.number else ""
    return f"no room for {need}{': room ' + number if number else ''}; {'; '.join(told)}"


def nodes() -> list[Node]:
    """The nodes of the cluster, with what is free on each now."""
    free = ray._private.state.available_resources_per_node()  # ray.available_resources adds up
    return [
        Node(n["NodeManagerAddress"] + f" ({n['NodeID'][:8]})", n["Labels"], n["Resources"],
             free.get(n["NodeID"], {}))
        for n in ray.nodes() if n["Alive"]
    ]  # fmt: skip


class Placement:
    """The room reserved for a run's parts, until `end`."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self._needs: dict[str, Need] = {}
        self._groups: dict[str, Any] = {}

    def reserve(self, actors: int) -> None:
        """Room for every part, this many rollout actors among them. NoPlace, with what is missing,
        where there is none within `limits.placement_seconds`."""
        for key, need in needs(self.config, actors).items():
            self._ask(key, need)
        self.wait(list(self._groups))
        self.leave("reward")  # Serve asks for it next

    def _ask(self, key: str, need: Need) -> None:
        self._needs[key] = need
        self._groups[key] = placement_group(
            [need.bundle] * need.number, need.spread.value,
            bundle_label_selector=[need.labels] * need.number if need.on else None,
        )  # fmt: skip

    def wait(self, keys: list[str]) -> None:
        """Until these have room. NoPlace as `reserve` has it."""
        began, told, seconds = time.monotonic(), False, self.config.limits.placement_seconds
        while missing := [key for key in keys if not self.there(key)]:
            spent = time.monotonic() - began
            if spent > seconds:
                raise NoPlace(f"{self.missing(missing[0])} (limits.placement_seconds={seconds:g})")
            if not told and spent > SILENCE:
                self.say(f"waiting at most {seconds:g} s: {self.missing(missing[0])}")
                told = True
            time.sleep(POLL_SECONDS)

    def add(self, index: int) -> None:
        """Ask for room for one more rollout actor; not waited for."""
        need = actor_need(self.config, index)
        if need.bundle and actor(index) not in self._groups:
            self._ask(actor(index), need)

    def there(self, key: str) -> bool:
        """Whether the part has its room: it may be waiting for it, or its node may be lost."""
        return self._group(key) is None or self._state(key) == "CREATED"

    def _state(self, key: str) -> str:
        """Of a part's group, as Ray has it. One that lost a node is asked for anew, and whoever is
        still in it ends: Ray would try to place it again without a pause, which keeps a core of
        the head busy (ray-project/ray#65007)."""
        state = str(placement_group_table(self._group(key))["state"])
        if state == "RESCHEDULING":
            need = self._needs[key := self._key(key)]
            self.leave(key)
            self._ask(key, need)
        return state

    def missing(self, key: str) -> str:
        """What keeps a part from having room, in one line."""
        return lacking(self._needs[self._key(key)], nodes())

    def options(self, key: str, bundle: int = 0) -> dict[str, Any]:
        """Options of the Ray actor that takes the room."""
        if self._group(key) is None:
            return {}
        self._state(key)
        if self.config.cluster.colocated:
            bundle = 0
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group(key), bundle)}

    def _group(self, key: str) -> Any:
        return self._groups.get(self._key(key))

    def _key(self, key: str) -> str:
        return "learner" if self.config.cluster.colocated and key != "reward" else key

    def leave(self, key: str) -> None:
        """Give the room back; a process that is still in it ends."""
        self._needs.pop(key, None)
        if (group := self._groups.pop(key, None)) is not None:
            remove_placement_group(group)

    def end(self) -> None:
        """Give all of it back."""
        for key in list(self._groups):
            self.leave(key)

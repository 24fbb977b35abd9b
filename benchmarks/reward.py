"""The reward service beside calling its reward directly, and under more than it can do.

- efficiency: responses/s of a reward model behind Serve, its one replica kept supplied, over those
  of the same `RewardModel` called in this process with batches of the same size, in turn;
- latency: one lease of 10 responses at a time, through the service less directly;
- overload: far more leases at once than the service holds (`max_queued_requests`), by real actors'
  scoring into a real replay queue, whose ledger is printed at the height and at the end.

Settings: repeats=5, batches=20 (a turn), batch=256, callers=16, calls=200 (for the latency),
flood=800 (leases at once).
"""

import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig

from actors.actor import Lease, score
from actors.engine import Request
from actors.packing import pack
from actors.prompts import Prompt
from actors.rollout import Version
from benchmarks import results
from benchmarks.outside import own_settings
from cluster import connection
from configs.choices import RewardKind
from configs.load import prepare
from configs.schema import ClusterConfig, RewardConfig
from learner.replay.queue import ReplayQueue
from learner.replay.settings import rules
from learner.replay.staleness import plan
from reward_server.client import RewardClient
from reward_server.rewards import InProcess
from reward_server.service import deploy

LENGTH, VOCABULARY = 64, 1000  # of a response; of the reward model
WAIT_SECONDS, START_SECONDS = 120.0, 600.0
DEFAULTS = {"repeats": 5, "batches": 20, "batch": 256, "callers": 16, "calls": 200, "flood": 800}
Pairs = tuple[list[list[int]], list[list[int]]]


def main(overrides: list[str]) -> None:
    """Print and write efficiency, latency and what overload does."""
    own, rest = own_settings(overrides, DEFAULTS)
    if rest:
        raise ValueError(f"{rest[0]}: the settings are {', '.join(DEFAULTS)}")
    torch.set_num_threads(1)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a line for each request it sheds
    with tempfile.TemporaryDirectory() as folder, connection.connected(ClusterConfig()):
        record: dict[str, Any] = {"settings": own}
        with deploy(RewardConfig(), "bench-peak", START_SECONDS) as peak:  # keeps Serve up
            record["latency"] = latency(peak.client, own["calls"], own["repeats"])
            record["efficiency"] = efficiency(_model(Path(folder)), own)
            record["overload"] = overload(own["flood"])
    print(_report(record))
    results.write("reward", record)


def _model(folder: Path) -> str:
    """A reward model of 0.9M parameters with random weights, as a directory."""
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=2 * LENGTH, pad_token_id=0,
    )  # fmt: skip
    shape.num_labels = 1
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    return str(folder)


def _pairs(count: int) -> Pairs:
    draw = np.random.default_rng(0)
    return [[0]] * count, draw.integers(1, VOCABULARY, (count, LENGTH)).tolist()


def efficiency(path: str, own: dict[str, int]) -> list[dict[str, float]]:
    """Responses/s of both, in turn. A caller has one request under way, an eighth of a batch."""
    config = RewardConfig(kind=RewardKind.model, path=path, batch=own["batch"])
    direct, whole = InProcess(config), _pairs(own["batch"])
    each = _pairs(max(1, own["batch"] * 2 // own["callers"]))
    requests = own["batches"] * own["batch"] // len(each[1])
    rows = []
    with (
        deploy(config, "bench-model", START_SECONDS) as service,
        ThreadPoolExecutor(own["callers"]) as threads,
    ):

        def through(_: int) -> int:
            return len(service.client.score(*each, WAIT_SECONDS).failures)

        def served() -> None:
            if failed := sum(threads.map(through, range(requests))):
                raise RuntimeError(f"{failed} responses were not scored")

        def called() -> None:
            for _ in range(own["batches"]):
                direct.score(*whole)

        direct.score(*whole)
        through(0)
        for _ in range(own["repeats"]):
            one = own["batches"] * own["batch"] / _seconds(called)
            other = requests * len(each[1]) / _seconds(served)
            rows.append({"direct_per_s": one, "service_per_s": other, "ratio": other / one})
    return rows


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def latency(client: RewardClient, calls: int, repeats: int) -> list[dict[str, float]]:
    """Milliseconds of a lease alone, the bandit's reward: direct, served, median and 95%."""
    direct, pairs, rows = InProcess(RewardConfig()), _pairs(10), []

    def ask() -> object:
        return client.score(*pairs, WAIT_SECONDS)

    ask()
    for _ in range(repeats):
        one = [1e3 * _seconds(lambda: direct.score(*pairs)) for _ in range(calls)]
        other = [1e3 * _seconds(ask) for _ in range(calls)]
        rows.append({
            "direct_ms": statistics.median(one),
            "served_ms": statistics.median(other),
            "served_95_ms": float(np.quantile(other, 0.95)),
            "added_ms": statistics.median(other) - statistics.median(one),
        })  # fmt: skip
    return rows


def overload(leases: int) -> dict[str, Any]:
    """So many leases of 10 responses at once, each scored as an actor does and put into a replay
    queue; what the service does not take is a stated failure, and retires as `reward_failed`."""
    path = "benchmarks.slow_reward:score"
    config = RewardConfig(kind=RewardKind.function, path=path, batch=64)
    with deploy(config, "bench-slow", START_SECONDS) as service:
        queue, held = _queue(leases)
        started, lock, words = time.perf_counter(), threading.Lock(), set[str]()

        def work(lease: Lease) -> None:
            block = pack_lease(lease)
            score(block, service.client, WAIT_SECONDS)
            with lock:
                words.update(block.failures.values())
                queue.put(lease, block)

        with ThreadPoolExecutor(leases) as threads:
            work_all = threads.map(work, held)
            time.sleep(0.5)
            with lock:
                height = queue.ledger.counts()
            list(work_all)
        seconds = time.perf_counter() - started
        return {
            "leases": leases, "seconds": seconds, "at_0.5_s": height,
            "at_the_end": queue.ledger.counts(), "failures_say": sorted(words)[:3],
            "alive_after": _alive(service.client),
        }  # fmt: skip


def _queue(leases: int) -> tuple[ReplayQueue, list[Lease]]:
    """The bandit's replay queue with a round of so many leases, all handed out."""
    sizes = [f"replay.samples_per_round={10 * leases}", f"learner.minibatch={10 * leases}"]
    more = ["rollout.lease=1", "limits.failure_rate=1.0", "replay.inner_epochs=1"]
    config = prepare("bandit", [*sizes, *more])
    queue = ReplayQueue(plan(config), config.learner.ranks, rules(config))
    queue.publish(Version(0, 0), [None])
    held = [queue.lease(actor) for actor in range(leases)]
    return queue, [lease for lease in held if lease is not None]


def pack_lease(lease: Lease) -> Any:
    """Ten responses of one token to each prompt of a lease."""
    requests = [Request(g, Prompt(np.zeros(1, dtype=np.int32), 0)) for g in lease.groups]
    count = 10 * len(requests)
    ones_K, zeros_K = np.ones(count, dtype=np.int64), np.zeros(count)
    return pack(requests, 10, 1.0, ones_K, ones_K, zeros_K, zeros_K, zeros_K)


def _alive(client: RewardClient) -> bool:
    """Whether the service scores again once the flood is over."""
    return not client.score([[0]], [[1]], WAIT_SECONDS).failures


def _report(record: dict[str, Any]) -> str:
    rows, waits, flood = record["efficiency"], record["latency"], record["overload"]

    def told(of: Sequence[dict[str, float]], name: str, digits: int = 2) -> str:
        return results.spread([row[name] for row in of], digits)

    def ledger(counts: dict[str, Any]) -> str:
        retired = {reason: n for reason, n in counts["retired"].items() if n}
        parts = f"in_flight {counts['in_flight']} + queued {counts['queued']}"
        return f"issued {counts['issued']} = {parts} + retired {retired or 0}"

    return "\n".join([
        f"reward model, direct   {told(rows, 'direct_per_s', 0)} responses/s",
        f"reward model, served   {told(rows, 'service_per_s', 0)} responses/s",
        f"a lease, direct        {told(waits, 'direct_ms')} ms",
        f"a lease, served        {told(waits, 'served_ms')} ms, "
        f"95% within {told(waits, 'served_95_ms')} ms",
        f"overload: {flood['leases']} leases at once, over after {flood['seconds']:.1f} s",
        f"  ledger after 0.5 s   {ledger(flood['at_0.5_s'])}",
        f"  ledger at the end    {ledger(flood['at_the_end'])}",
        *(f"  a failure says: {words}" for words in flood["failures_say"][:1]),
        f"  the service scores again: {flood['alive_after']}",
        f"reward: service / direct, responses/s = {told(rows, 'ratio')}; "
        f"added latency {told(waits, 'added_ms')} ms",
    ])  # fmt: skip

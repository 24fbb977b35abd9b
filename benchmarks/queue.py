"""The replay queue's rollouts per second beside Reverb's and a plain list's in a Ray actor.

Groups of 8 rollouts; a put carries `lease` groups, a get a minibatch of 64. Ours is the service as
a run has it (leases, age and reuse tags, staleness budget, ledger, commits) without its journal.
The list tags and accounts nothing; it is also put into an asyncio actor, which ours is. Reverb 0.14
runs in an environment of its own, made at the first time. All take turns, each in processes of its
own: a store, producers, one consumer. Then ours is filled further and further.

Settings of its own: tokens=256,8192 producers=1,4,16 lease=1,10 (groups a put; all but the first
with the first length and number of producers) in_flight=4 (puts that a producer has on the way; of
Reverb at least 4) turns=5 seconds=1 (of a turn's inserts) samples=32768 (of a turn, fewer of longer
rollouts) held=1000,10000,100000,1000000 (0 leaves it out) reverb=true; all others are those of a
run.
"""

import time
from typing import Any, NamedTuple

import ray

from benchmarks import queue_other, results
from benchmarks.outside import split
from benchmarks.queue_parts import AsyncList, BenchQueue, Consumer, PlainList, Producer
from benchmarks.queue_payload import MEMBERS, block_of
from benchmarks.queue_table import held_table, rate_table
from cluster import connection
from cluster.run_directory import describe_environment
from configs.errors import ConfigError
from configs.load import prepare
from learner.replay.settings import Settings as QueueSettings
from learner.replay.settings import of

BATCH, ROUND, PASSES = 64, 512, 4  # M, B and T, in rollouts
SOON = 0.5  # seconds until producers begin together


class Settings(NamedTuple):
    """The bench's own settings."""

    tokens: tuple[int, ...] = (256, 8192)
    producers: tuple[int, ...] = (1, 4, 16)
    lease: tuple[int, ...] = (1, 10)
    in_flight: int = 4
    turns: int = 5
    seconds: float = 1.0
    samples: int = 32_768
    held: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    reverb: bool = True


class Leg(NamedTuple):
    """Sizes of one row of the table."""

    tokens: int
    producers: int
    lease: int  # groups


def parse(overrides: list[str]) -> tuple[Settings, list[str]]:
    """The bench's own settings, and the rest. ConfigError for a value that cannot be used."""
    given, rest = split(overrides, Settings._fields)
    own: dict[str, Any] = {}
    for key, value in given.items():
        try:
            own[key] = _value(value, getattr(Settings(), key), least=0 if key == "held" else 1)
        except ValueError:
            default = str(getattr(Settings(), key)).strip("()").replace(" ", "").lower()
            raise ConfigError(key, value, "cannot be used", f"set {key}={default}") from None
    return Settings(**own), rest


def _value(text: str, default: Any, least: int) -> Any:
    """A value of the default's kind; ValueError where it is none."""
    if isinstance(default, bool):
        return {"true": True, "false": False}[text] if text in ("true", "false") else int("none")
    if isinstance(default, tuple):
        return tuple(_value(part, default[0], least) for part in text.split(","))
    number = type(default)(text)
    if number < least * (0.05 if isinstance(default, float) else 1):
        raise ValueError
    return number


def legs(own: Settings) -> list[Leg]:
    """Which inserts are measured: every number of producers, then the larger puts and lengths."""
    first = own.tokens[0]
    return [
        *(Leg(first, producers, own.lease[0]) for producers in own.producers),
        *(Leg(first, own.producers[0], lease) for lease in own.lease[1:]),
        *(Leg(tokens, own.producers[0], own.lease[0]) for tokens in own.tokens[1:]),
    ]


def queue_settings(lease: int, overrides: list[str]) -> QueueSettings:
    """The queue's settings as a run's; the budget is so wide that inserts never wait for steps."""
    config = prepare("bandit_pipelined", [
        f"rollout.responses_per_prompt={MEMBERS}", f"learner.minibatch={BATCH}",
        f"replay.samples_per_round={ROUND}", f"replay.inner_epochs={PASSES}",
        f"rollout.lease={lease}", "replay.max_age=1000000000", "learner.updates=1000000000",
        *overrides,
    ])  # fmt: skip
    return of(config, None, results.FOLDER)


class Bench:
    """The processes, and what they measure."""

    def __init__(
        self, own: Settings, overrides: list[str], other: queue_other.Reverb | None
    ) -> None:
        self.own, self.overrides, self.other = own, overrides, other
        self.producers = [_start(Producer, n) for n in range(max(own.producers))]
        self.consumer, self.plain = _start(Consumer), _start(PlainList)
        self.asyncio = _start(AsyncList, max_concurrency=1000)
        self.queues = {lease: self.queue(lease) for lease in own.lease}

    def queue(self, lease: int) -> Any:
        """One more queue, whose leases are of so many groups."""
        return _start(BenchQueue, queue_settings(lease, self.overrides), max_concurrency=1000)

    def insert(self, leg: Leg) -> dict[str, Any]:
        """A row: rates of all sides by turns, and what ours and the list's process spent."""
        queue = self.queues[leg.lease]
        ray.get([p.load.remote(leg.lease, leg.tokens, self.own.in_flight) for p in self.producers])
        plain = {"list": self.plain, "asyncio": self.asyncio}
        row: dict[str, Any] = {**leg._asdict(), "do": "insert"}
        for _ in range(self.own.turns):
            ray.get(queue.begin.remote(0, leg.tokens))
            self._both(row, "ours", queue, leg.producers)
            for side, store in plain.items():
                ray.get(store.begin.remote(0, leg.lease, leg.tokens))
                self._both(row, side, store, leg.producers)
                ray.get(store.begin.remote(0, leg.lease, leg.tokens))
            if self.other:
                job = {**leg._asdict(), "do": "insert", "seconds": self.own.seconds,
                       "in_flight": max(4, self.own.in_flight)}  # fmt: skip
                row.setdefault("reverb", []).append(self.other.ask(**job))
        row["within_us"] = _within(ray.get(queue.books.remote()))
        return row

    def _both(self, row: dict[str, Any], side: str, store: Any, producers: int) -> None:
        """Add the rate of inserting for a turn, and the CPU time of the store's process."""
        before = ray.get(store.process.remote())["cpu"]
        done, rate = self._produce(side, store, producers)
        spent = ray.get(store.process.remote())["cpu"] - before
        row.setdefault(side, []).append(rate)
        row.setdefault("cpu_us", {}).setdefault(side, []).append(1e6 * spent / done)

    def _produce(self, side: str, store: Any, producers: int) -> tuple[int, float]:
        """Rollouts, and rollouts per second, of so many producers that begin at once."""
        start = time.monotonic() + SOON
        method = "ours" if side == "ours" else "plain"
        done = ray.get([
            getattr(producer, method).remote(store, start, self.own.seconds)
            for producer in self.producers[:producers]
        ])  # fmt: skip
        count = sum(n for n, _ in done)
        return count, count / (max(end for _, end in done) - start)

    def sample(self, tokens: int) -> dict[str, Any]:
        """A row as `insert` gives it, of a consumer's minibatches."""
        lease, short = self.own.lease[0], self.own.tokens[0]
        samples = max(4 * BATCH, self.own.samples * short // tokens)
        fill = (samples // (ROUND * PASSES) + 2) * ROUND
        queue = self.queues[lease]
        row: dict[str, Any] = {"do": "sample", "tokens": tokens, "lease": lease, "ours": [],
                               "list": []}  # fmt: skip
        for _ in range(self.own.turns):
            ray.get(queue.begin.remote(fill, tokens))
            row["ours"].append(ray.get(self.consumer.ours.remote(queue, samples, 0)))
            row["within_us"] = _within(ray.get(queue.books.remote()))
            ray.get(queue.begin.remote(0, tokens))
            blocks = BATCH // (MEMBERS * lease)
            ray.get(self.plain.begin.remote(fill // (MEMBERS * lease), lease, tokens))
            row["list"].append(ray.get(self.consumer.plain.remote(self.plain, samples, blocks)))
            ray.get(self.plain.begin.remote(0, lease, tokens))
            if self.other:
                job = {"do": "sample", "tokens": tokens, "lease": lease, "fill": fill,
                       "in_flight": 4}  # fmt: skip
                row.setdefault("reverb", []).append(self.other.ask(**job, samples=samples))
        return row

    def held(self) -> list[dict[str, Any]]:
        """A row for each number of rollouts held: ours alone, in turns."""
        tokens, lease = self.own.tokens[0], self.own.lease[0]
        ray.get(self.producers[0].load.remote(lease, tokens, self.own.in_flight))
        queues = {count: self.queue(lease) for count in self.own.held if count}
        rows: dict[int, dict[str, Any]] = {
            count: {"held": count, "insert": [], "sample": []} for count in queues
        }
        for _ in range(self.own.turns):
            for count, queue in queues.items():
                self._fill(queue, count, rows[count])
                rows[count]["insert"].append(self._produce("ours", queue, 1)[1])
                books = ray.get(queue.books.remote())
                most = books["queued"] // ROUND * ROUND * PASSES - 2 * BATCH
                taken = min(self.own.samples, most) // BATCH * BATCH
                call = self.consumer.ours.remote(queue, taken, books["committed"])
                rows[count]["sample"].append(ray.get(call))
        for queue in queues.values():
            ray.kill(queue)
        return list(rows.values())

    def _fill(self, queue: Any, count: int, row: dict[str, Any]) -> None:
        """Have it hold about so many; notes what memory the first filling took, over its bytes.

        After that it is filled anew: it is to have held as many before, for the first touch of a
        page costs a virtual machine more than all of the put, and a machine of one's own little.
        """
        if abs(ray.get(queue.books.remote())["queued"] - count) <= count / 5:
            return
        before = ray.get(queue.process.remote())["bytes"]
        ray.get(queue.begin.remote(count, self.own.tokens[0]))
        if "memory" not in row:
            used = ray.get(queue.process.remote())["bytes"] - before
            row["memory"] = used / (count * self._bytes())
            more = count + self.own.turns * self.own.samples
            ray.get(queue.begin.remote(more, self.own.tokens[0]))
            ray.get(queue.begin.remote(count, self.own.tokens[0]))

    def _bytes(self) -> float:
        """Of a rollout's columns."""
        return block_of(self.own.lease[0], self.own.tokens[0]).nbytes / self.own.lease[0] / MEMBERS

    def memory(self) -> dict[str, float]:
        """Memory that a queue's process takes for rollouts that producers put, over their bytes."""
        tokens, lease = self.own.tokens[0], self.own.lease[0]
        ray.get(self.producers[0].load.remote(lease, tokens, self.own.in_flight))
        queue = self.queue(lease)
        ray.get(queue.begin.remote(ROUND, tokens))
        before = ray.get(queue.process.remote())["bytes"]
        done = sum(self._produce("ours", queue, 1)[0] for _ in range(3))
        used = ray.get(queue.process.remote())["bytes"] - before
        ray.kill(queue)
        return {"rollouts": done, "bytes": self._bytes(), "ratio": used / done / self._bytes()}


def _start(kind: type, *arguments: Any, **options: Any) -> Any:
    return ray.remote(kind).options(num_cpus=0, **options).remote(*arguments)


def _within(books: dict[str, Any]) -> dict[str, float]:
    """Microseconds a rollout spent within the queue itself, by method."""
    count = books["issued"] if "put" in books["spent"] else BATCH * books["committed"]
    return {name: 1e6 * seconds / max(1, count) for name, seconds in books["spent"].items()}


def main(overrides: list[str]) -> None:
    """Print rates and ratios with their spread, and write them."""
    own, rest = parse(overrides)
    begun = time.monotonic()
    other = queue_other.reverb() if own.reverb else None
    record: dict[str, Any] = {"settings": own._asdict(), "rows": []}
    with connection.connected(prepare("bandit_pipelined", rest).cluster):
        bench = Bench(own, rest, other)
        print(rate_table.__doc__)
        for leg in legs(own):
            record["rows"].append(bench.insert(leg))
            print(rate_table(record["rows"][-1:]), flush=True)
        for tokens in own.tokens:
            record["rows"].append(bench.sample(tokens))
            print(rate_table(record["rows"][-1:]), flush=True)
        record["memory"] = bench.memory()
        record["held"] = bench.held()
    if other:
        other.close()
    print(held_table(record["held"], record["memory"]))
    record |= {"environment": describe_environment(), "seconds": time.monotonic() - begun}
    print(results.write("queue", record))

"""The Reverb side of `benchmarks.queue`; runs under the Python of Reverb's own environment.

A command a line on standard input, its answer a line on standard output, both JSON. A server, each
producer and the consumer are processes of their own, forked once Reverb is imported (it brings
TensorFlow, some seconds). An item is what one of our puts carries: all columns of a lease's groups,
tagged with their version as ours are. Sampling is uniform; what it returns is not stacked.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import reverb

from benchmarks.queue_payload import MEMBERS, block_of, columns

TABLE = "rollouts"
PATIENCE = 300.0  # seconds for any one answer
FORK = multiprocessing.get_context("fork")


def serve(pipe: Any) -> None:
    """A server with one table, until it is told to end."""
    table = reverb.Table(
        TABLE, sampler=reverb.selectors.Uniform(), remover=reverb.selectors.Fifo(),
        max_size=10**8, rate_limiter=reverb.rate_limiters.MinSize(1),
    )  # fmt: skip
    server = reverb.Server([table], port=None)
    pipe.send(server.port)
    pipe.recv()
    server.stop()


def produce(pipe: Any, port: int, job: dict[str, Any]) -> None:
    """Insert for so many seconds, or so many rollouts; sends rollouts and seconds."""
    block = block_of(job["lease"], job["tokens"])
    step, rollouts = columns(block), block.groups * MEMBERS
    client = reverb.Client(f"localhost:{port}")
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        pipe.send("ready")
        pipe.recv()
        done, started = 0, time.perf_counter()
        while done < job["rollouts"] and time.perf_counter() - started < job["seconds"]:
            writer.append(step)
            writer.create_item(TABLE, 1.0, {name: column[-1:] for name, column in
                                            writer.history.items()})  # fmt: skip
            writer.flush(block_until_num_items=job["in_flight"])
            done += rollouts
        writer.flush()
        pipe.send((done, time.perf_counter() - started))


def consume(pipe: Any, port: int, job: dict[str, Any]) -> None:
    """Sample so many rollouts; sends how many, and the seconds."""
    client = reverb.Client(f"localhost:{port}")
    pipe.send("ready")
    pipe.recv()
    rollouts = job["lease"] * MEMBERS
    items, started = job["samples"] // rollouts, time.perf_counter()
    done = sum(1 for _ in client.sample(TABLE, num_samples=items, emit_timesteps=False))
    assert done == items, f"{done} of {items} items"
    pipe.send((done * rollouts, time.perf_counter() - started))


def together(what: Callable[..., None], count: int, port: int, job: dict[str, Any]) -> float:
    """Rollouts per second of so many processes that begin at once."""
    pipes, processes = [], []
    for _ in range(count):
        here, there = FORK.Pipe()
        process = FORK.Process(target=what, args=(there, port, job))
        process.start()
        there.close()  # so that the end of a process that fails is seen
        processes.append(process)
        pipes.append(here)
    for pipe in pipes:
        _answer(pipe)
    for pipe in pipes:
        pipe.send("go")
    answers = [_answer(pipe) for pipe in pipes]
    for process in processes:
        process.join()
    return sum(done for done, _ in answers) / max(seconds for _, seconds in answers)


def _answer(pipe: Any) -> Any:
    """EOFError where its process ended, TimeoutError where it says nothing."""
    if not pipe.poll(PATIENCE):
        raise TimeoutError(f"a process has not answered for {PATIENCE:.0f} s")
    return pipe.recv()


def measure(job: dict[str, Any]) -> float:
    """Rollouts per second of what is asked, on a fresh server."""
    here, there = FORK.Pipe()
    server = FORK.Process(target=serve, args=(there,))
    server.start()
    there.close()
    try:
        port = _answer(here)
        if job["do"] == "insert":
            return together(produce, job["producers"], port, {**job, "rollouts": 10**12})
        together(produce, 1, port, {**job, "rollouts": job["fill"], "seconds": 600.0})
        return together(consume, 1, port, job)
    finally:
        here.send("end")
        server.join(20.0)
        server.kill()


def main() -> None:
    """Answer commands until there are no more."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

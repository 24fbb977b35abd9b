"""The two processes of `benchmarks.weights`, as Ray actors: who sends weights and who takes them.

Times are those of one monotonic clock, which all processes of a machine share; in seconds.
"""

import contextlib
import ctypes
import time
from collections import Counter
from typing import Any

import numpy as np
import ray
import torch

from actors import policy
from actors.engine import Request
from actors.prompts import Prompt
from actors.rollout import GroupId, Version
from actors.torch_engine import TorchEngine
from cluster.rollout_worker import build_engine
from configs.schema import Config

CALLS = {  # vLLM's calls during an update → the part of it that they are
    "pause_scheduler_async": "pause", "reset_prefix_cache": "pause", "start_weight_update": "start",
    "update_weights": "update", "finish_weight_update": "finish", "resume_generation": "resume",
}  # fmt: skip


class Part:
    """What both have."""

    def ready(self) -> bool:
        """Answers once the process is built."""
        return True

    def close(self) -> None:
        """End the processes below this one."""


class Sender(Part):
    """The learner's side: a network of the policy's architecture, read out and put into the object
    store as `learner.worker` does it."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.cluster.threads)
        torch.manual_seed(config.seed)
        self.model = policy.build(policy.architecture(config), config.learner.precision)
        self.kept: np.ndarray | None = None

    def parameters(self) -> int:
        """Numbers in the weights, tied ones once."""
        return sum(p.numel() for p in policy.parameters(self.model))

    @torch.no_grad()
    def clone(self) -> float:
        """Seconds for cloning the weights (tied ones once) into memory that is fresh: what the
        allocator holds of earlier clones is handed back to the system before."""
        with contextlib.suppress(OSError, AttributeError):  # glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        started = time.monotonic()
        cloned = {name: p.clone() for name, p in self.model.named_parameters()}
        seconds = time.monotonic() - started
        del cloned
        return seconds

    def publish(self) -> dict[str, Any]:
        """Times `started`, `read` and `put`, and `weights`: a list with the reference."""
        started = time.monotonic()
        self.kept = policy.flatten(self.model, self.kept)
        read = time.monotonic()
        reference = ray.put(self.kept)
        return {"started": started, "read": read, "put": time.monotonic(), "weights": [reference]}


class Receiver(Part):
    """A rollout actor's process: the engine, without the queue and the reward service.

    Two calls at a time: an update may come while it generates.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine: Any = build_engine(config)
        self.calls: list[tuple[str, float, float]] = []  # part, begin and end, of one update
        self.came: list[float] = []  # when tokens came from vLLM's engine process
        if process := getattr(self.engine, "process", None):
            for name in CALLS:
                owner = process.llm.engine_core if name.endswith("_async") else process.llm
                self._time(owner, name)
            self._note_tokens(process.llm.output_processor)

    def _time(self, owner: Any, name: str) -> None:
        """Have a coroutine function of vLLM's note when it began and ended in `calls`."""
        plain = getattr(owner, name)

        async def timed(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return await plain(*arguments, **options)
            finally:
                self.calls.append((CALLS[name], began, time.monotonic()))

        setattr(owner, name, timed)

    def _note_tokens(self, processor: Any) -> None:
        """Have vLLM's processor of outputs note in `came` when there are some."""
        plain = processor.process_outputs

        def noted(outputs: Any, *arguments: Any, **options: Any) -> Any:
            if outputs:
                self.came.append(time.monotonic())
            return plain(outputs, *arguments, **options)

        processor.process_outputs = noted

    def take_own(self) -> None:
        """Have the torch engine call the weights that it was built with version 0: it samples
        under none else. vLLM's answers before its first version are not refused."""
        if isinstance(self.engine, TorchEngine):
            self.engine.load(policy.flatten(self.engine.model), Version(0, 0))

    def update(self, weights: list[Any], step: int) -> dict[str, Any]:
        """Take published weights as this step's. Times `arrived`, `got` and `resumed`, from which
        on the engine may generate; `parts`: the seconds between, by what they went to; `stall`:
        those that nothing could be generated in, of an engine that was generating."""
        arrived = time.monotonic()
        flat = ray.get(weights[0])
        got = time.monotonic()
        self.calls.clear()
        self.engine.load(flat, Version(0, step))
        resumed = time.monotonic()
        ends = {part: end for part, _, end in self.calls}
        return {
            "arrived": arrived, "got": got, "resumed": resumed, "parts": self._parts(got, resumed),
            "stall": ends["resume"] - ends["pause"] if "resume" in ends else 0.0,
        }  # fmt: skip

    def _parts(self, got: float, resumed: float) -> dict[str, float]:
        """Seconds of an update within the actor. What comes before vLLM's first call is the `copy`,
        into shared memory or, on the torch engine, the network; what comes after its start, until
        it is paused, the `stage`: making ready beside what it generates."""
        parts = {"copy": (self.calls[0][1] if self.calls else resumed) - got}
        for place, (part, began, ended) in enumerate(self.calls):
            parts[part] = ended - began
            if part == "start":
                parts["stage"] = self.calls[place + 1][1] - ended
        return parts

    def generate(self, groups: int) -> dict[str, Any]:
        """`rollouts` and `tokens` made for so many prompts, the `versions` that made them, and when
        they `came` (vLLM)."""
        self.came.clear()
        vocabulary = self.config.policy.bandit.vocabulary
        requests = [
            Request(GroupId(n, 0), Prompt(np.array([n % vocabulary], dtype=np.int32), n))
            for n in range(groups)
        ]
        block = self.engine.generate(requests, "rollout")
        if block.failures:
            raise RuntimeError(f"generation failed: {next(iter(block.failures.values()))}")
        made = {"rollouts": len(block.status_N), "tokens": len(block.token_K)}
        return {**made, "versions": len(np.unique(block.step_K)), "came": list(self.came)}

    def generate_for(self, seconds: float, groups: int) -> dict[str, float]:
        """Generate leases of so many prompts one after another until the seconds are over;
        `rollouts` and `tokens` made, and the `seconds` it took."""
        made: Counter[str] = Counter()
        started = time.monotonic()
        while (spent := time.monotonic() - started) < seconds or not made:
            one = self.generate(groups)
            made.update({name: one[name] for name in ("rollouts", "tokens")})
        return {"rollouts": made["rollouts"], "tokens": made["tokens"], "seconds": spent}

    def close(self) -> None:
        self.engine.close()

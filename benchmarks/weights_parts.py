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
from cluster.rollout_worker import build_engine
from configs.schema import Config

VLLM_PARTS = {  # vLLM's calls during an update → the part of it that they are
    "pause_generation": "pause", "reset_prefix_cache": "pause", "start_weight_update": "start",
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
        self.parts: dict[str, float] = {}
        if process := getattr(self.engine, "process", None):
            for name in VLLM_PARTS:
                self._time(process.llm, name)

    def _time(self, llm: Any, name: str) -> None:
        """Have a coroutine function of vLLM's count its seconds in `parts`."""
        plain = getattr(llm, name)

        async def timed(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return await plain(*arguments, **options)
            finally:
                part, spent = VLLM_PARTS[name], time.monotonic() - started
                self.parts[part] = self.parts.get(part, 0.0) + spent

        setattr(llm, name, timed)

    def update(self, weights: list[Any], step: int) -> dict[str, Any]:
        """Take published weights as this step's. Times `arrived`, `got` and `resumed`, from which
        on the engine may generate; `parts`: seconds of vLLM's share."""
        arrived = time.monotonic()
        flat = ray.get(weights[0])
        got = time.monotonic()
        self.parts.clear()
        self.engine.load(flat, Version(0, step))
        resumed = time.monotonic()
        return {"arrived": arrived, "got": got, "resumed": resumed, "parts": dict(self.parts)}

    def generate(self, groups: int) -> dict[str, int]:
        """`rollouts` and `tokens` made for so many prompts, and the `versions` that made them."""
        vocabulary = self.config.policy.bandit.vocabulary
        requests = [
            Request(GroupId(n, 0), Prompt(np.array([n % vocabulary], dtype=np.int32), n))
            for n in range(groups)
        ]
        block = self.engine.generate(requests, "rollout")
        if block.failures:
            raise RuntimeError(f"generation failed: {next(iter(block.failures.values()))}")
        made = {"rollouts": len(block.status_N), "tokens": len(block.token_K)}
        return {**made, "versions": len(np.unique(block.step_K))}

    def generate_for(self, seconds: float, groups: int) -> dict[str, float]:
        """Generate leases of so many prompts one after another until the seconds are over;
        `rollouts` and `tokens` made, and the `seconds` it took."""
        made: Counter[str] = Counter()
        started = time.monotonic()
        while (spent := time.monotonic() - started) < seconds or not made:
            made.update(self.generate(groups))
        return {"rollouts": made["rollouts"], "tokens": made["tokens"], "seconds": spent}

    def close(self) -> None:
        self.engine.close()

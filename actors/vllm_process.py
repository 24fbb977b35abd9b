"""vLLM's AsyncLLM in a thread of its own, seen from ordinary threads.

vLLM runs its engine and its worker as processes of their own below this one; this thread only talks
to them. The engine starts from the policy's architecture with weights that mean nothing: all that
it serves come from the learner, over `actors.vllm_transfer`.
"""

import asyncio
import concurrent.futures
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from transformers import PretrainedConfig

from actors import policy
from actors.shared_memory import WeightBuffer
from configs.schema import Config

BACKEND = "onpolicy_shared_memory"  # as in actors.vllm_transfer, which only vLLM may import
EXIT_SECONDS = 6.0  # vLLM takes 4.4 s to unload; killed, it would leave 0.1 MB in /dev/shm
PREFILL_TOKENS = 8192  # of prompts, at most, in one engine step on CPU
POLL_SECONDS = 1.0
DIED = "vLLM's engine process died (its own lines are in this process's log)"
BLOCK_SIZE = 32  # tokens per KV block on CPU: the smallest that its attention likes


class EngineDied(RuntimeError):
    """vLLM's engine process is gone; a new `VllmProcess` is needed."""


class VllmProcess:
    """A started engine: `llm` (use it on `loop` only), and `call` to run coroutines on that loop.

    Starting takes about 25 s. Raises ValueError where vLLM refuses the policy, TimeoutError after
    `limits.startup_seconds`.
    """

    def __init__(self, config: Config, shape: PretrainedConfig) -> None:
        prepare_environment(config.cluster.threads, config.rollout.vllm.compile)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self.thread.start()
        self.llm: Any = None
        names, shapes = policy.layout(shape)
        self.buffer = WeightBuffer(sum(math.prod(dimensions) for dimensions in shapes))
        try:
            starting = self._start(config, shape, names, shapes)
            self.call(starting, config.limits.startup_seconds, lambda: "vLLM is still starting")
        except BaseException:
            self.close()
            raise
        finally:
            self.buffer.unlink()

    async def _start(
        self, config: Config, shape: PretrainedConfig, names: list[str], shapes: list[list[int]]
    ) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        with tempfile.TemporaryDirectory(prefix="onpolicy-vllm-") as directory:
            policy.write_architecture(shape, directory)
            try:
                self.llm = AsyncLLM.from_engine_args(engine_arguments(config, shape, directory))
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                why = lines[-1] if lines else type(error).__name__
                raise ValueError(
                    f"rollout.engine=vllm cannot serve this policy: {why} "
                    "(vLLM's own lines are in this process's log)"
                ) from error
        info = {
            "path": self.buffer.path, "names": names, "shapes": shapes, "owner": os.getpid(),
        }  # fmt: skip
        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    def call(
        self, work: Coroutine[Any, Any, Any], seconds: float, waiting_for: Callable[[], str]
    ) -> Any:
        """Run a coroutine on the loop, from another thread.

        TimeoutError when `waiting_for`, a text that shows progress, reads the same `seconds` later;
        EngineDied as soon as vLLM's engine process is gone.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        seen, since = waiting_for(), time.monotonic()
        while True:
            done, _ = concurrent.futures.wait([future], min(POLL_SECONDS, seconds))
            if done:
                return future.result()
            if self.llm is not None and self.llm.errored:
                future.cancel()
                raise EngineDied(DIED)
            if (now := waiting_for()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                future.cancel()
                raise TimeoutError(f"no progress for {seconds:.0f} s: {now}")

    def close(self) -> None:
        """End vLLM's processes and the thread."""
        if self.llm is not None:
            self.loop.call_soon_threadsafe(self.llm.shutdown, EXIT_SECONDS)
            self.llm = None
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30.0)


def prepare_environment(threads: int, compile_: bool) -> None:
    """Environment variables that vLLM and its processes read; before vLLM is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not compile_:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first generation compiles for 20 s
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # other processes share the cores
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def engine_arguments(config: Config, shape: PretrainedConfig, directory: str) -> Any:
    """vLLM's AsyncEngineArgs for this policy, its architecture written to `directory`."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    settings, longest = config.rollout.vllm, policy.context(config, shape)
    cpu: dict[str, Any] = {}
    if not config.cluster.actor_gpus:
        # A prompt in chunks ends vLLM 0.32.0 on CPU when its request has a seed: it rewinds the
        # random generator, "CPU Generator does not use offset" (gpu_model_runner.py).
        cpu = {
            "block_size": BLOCK_SIZE,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, longest),
        }
    return AsyncEngineArgs(
        model=directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=config.learner.precision.value,
        seed=0,
        max_model_len=longest,
        max_num_seqs=settings.max_sequences,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) or None,
        enable_prefix_caching=settings.prefix_caching,
        enforce_eager=not settings.compile,
        logprobs_mode="processed_logprobs",
        max_logprobs=1,
        worker_extension_cls="actors.vllm_transfer.WorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        **cpu,
    )

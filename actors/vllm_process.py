"""vLLM's AsyncLLM in a thread of its own, seen from ordinary threads.

vLLM runs its engine and its worker as processes of their own below this one; this thread only talks
to them. The engine starts from the policy's architecture with weights that mean nothing: all that
it serves come from the learner, over `actors.vllm_transfer`.
"""

import asyncio
import concurrent.futures
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from actors import policy
from actors.shared_memory import WeightBuffer
from configs.errors import one_line
from configs.schema import Config

WORKER_EXTENSION = "actors.vllm_transfer.WorkerExtension"  # registers the transfer backends
EXIT_SECONDS = 6.0  # vLLM takes 4.4 s to unload; killed, it would leave 0.1 MB in /dev/shm
PREFILL_TOKENS = 8192  # of prompts, at most, in one engine step on CPU
POLL_SECONDS = 1.0
DIED = "vLLM's engine process died (its own lines are in this process's log)"
BLOCK_SIZE = 32  # tokens per KV block on CPU: the smallest that its attention likes
LOGGING, ERRORS = "logging.json", "errors.log"  # written beside the architecture
RECORD, TRACEBACK = "\x1e", "Traceback (most recent call last):"
FATAL = ("WorkerProc", "EngineCore")  # how vLLM's processes begin the record that they end with
# Where vLLM's advice begins, which names options that are not ours.
ADVICE = re.compile(
    r"[\s.]*(Try increasing|See https?:|Supported architectures|Decrease --|Reduce CPU memory|"
    r"On the CPU backend|For further information|Please check the stack|The available param).*",
    re.DOTALL,
)
FIXES = {  # what vLLM complains of → what to do about it
    r"KV\s+cache is needed|cache blocks": "set a higher rollout.vllm.kv_cache_gib, or lower "
    "prompts.max_tokens and rollout.max_tokens",
    r"less than (requested|desired)|allocate memory|MemoryError|signal 9": "set a lower "
    "rollout.vllm.kv_cache_gib or rollout.actors, or end other programs",
    r"(?i)architecture|no weights came|no module or parameter|vLLM impl|head_dim": "vLLM does not "
    "know this network: set rollout.engine=torch",
    r"(?i)dtype|bfloat16": "set learner.precision=float32, or rollout.engine=torch",
}


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
        from vllm.v1.engine.async_llm import AsyncLLM

        info = {
            "path": self.buffer.path, "names": names, "shapes": shapes, "owner": os.getpid(),
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="onpolicy-vllm-") as directory:
            policy.write_architecture(shape, directory)
            try:
                self.llm = AsyncLLM.from_engine_args(engine_arguments(config, shape, directory))
                await self._try_update(info)
            except Exception as error:
                errors = Path(directory, ERRORS)
                why = reason(error, errors.read_text("utf-8", "replace") if errors.exists() else "")
                raise ValueError(f"rollout.engine=vllm cannot serve this policy: {why}") from error

    async def _try_update(self, info: dict[str, Any]) -> None:
        """Ready vLLM for weights, and send it the empty buffer's: weights that do not fit its
        network end the start, not the run."""
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        await self.llm.start_weight_update()
        await self.llm.update_weights(WeightTransferUpdateRequest(update_info={}))
        await self.llm.finish_weight_update("none")

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
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(
            backend=f"onpolicy_{config.rollout.transfer.name}"
        ),
        disable_log_stats=True,
        **keep_errors(directory),
        **_device_arguments(config, longest),
    )


def _device_arguments(config: Config, longest: int) -> dict[str, Any]:
    """What differs between a CPU and GPUs. longest: prompt and response together, in tokens."""
    if config.cluster.actor_gpus:
        settings = config.rollout.vllm
        return {
            "tensor_parallel_size": settings.tensor_parallel,
            # One process a GPU below the engine's, as on a CPU; "ray" would want GPUs of its own.
            "distributed_executor_backend": "mp",
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enable_chunked_prefill": True,
            "enable_sleep_mode": config.cluster.colocated,
        }
    # A prompt in chunks ends vLLM 0.32.0 on CPU when its request has a seed: it rewinds the random
    # generator, "CPU Generator does not use offset" (gpu_model_runner.py).
    return {
        "block_size": BLOCK_SIZE,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(PREFILL_TOKENS, longest),
    }


def keep_errors(directory: str) -> dict[str, Any]:
    """Arguments with which vLLM's processes write their errors to ERRORS in `directory` too.

    None where the user has a logging configuration of their own.
    """
    from vllm import envs
    from vllm.config.logging import LoggingConfig
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    if envs.VLLM_LOGGING_CONFIG_PATH or not envs.VLLM_CONFIGURE_LOGGING:
        return {}
    settings = json.loads(json.dumps(DEFAULT_LOGGING_CONFIG))  # a copy
    settings["formatters"]["record"] = {"format": f"{RECORD}%(message)s"}
    settings["handlers"][ERRORS] = {
        "class": "logging.FileHandler", "filename": str(Path(directory, ERRORS)),
        "encoding": "utf-8", "formatter": "record", "level": "ERROR",
    }  # fmt: skip
    settings["loggers"]["vllm"]["handlers"].append(ERRORS)
    path = Path(directory, LOGGING)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return {"logging_config": LoggingConfig(pylogging_config_file=str(path))}


def reason(error: BaseException, errors: str) -> str:
    """Why vLLM did not start, in one line, with what to do about it where that is known.

    error: what its start raised here. errors: what its processes wrote to ERRORS; where they say
    nothing, `error` has to.
    """
    why = root_cause(errors)
    if not why:
        told = getattr(error, "errors", None)  # pydantic's, of settings that vLLM refuses
        why = str(told()[0]["msg"]) if callable(told) else f"{type(error).__name__}: {error}"
        why = re.sub(r"See root cause above\.\s*|^Value error, ", "", why)
        why = re.sub(r"\{.*: -(\d+)\}", r"ended by signal \1", why)
    why = one_line(ADVICE.sub("", why), 300)
    fix = next((fix for pattern, fix in FIXES.items() if re.search(pattern, why)), "")
    return f"{why}; {fix}" if fix else f"{why} (vLLM's own lines are in this process's log)"


def root_cause(errors: str) -> str:
    """The error that a process of vLLM ended with, from its log; empty where it logged none.

    Of several processes' it is the first: the later ones fail because of it.
    """
    records = [record for record in errors.split(RECORD) if TRACEBACK in record]
    for record in [r for r in records if r.startswith(FATAL)] or records:
        lines = record.rpartition(TRACEBACK)[2].splitlines()
        for place, line in enumerate(lines):
            if line and not line[0].isspace():
                return "\n".join(lines[place:])
    return ""

"""Settings of the vLLM engine, and of how weights reach it."""

from dataclasses import dataclass
from enum import Enum


class Transfer(Enum):
    """host: a flat float32 array through Ray's object store and shared memory, wherever actors are.
    nccl: broadcast from the learner's GPU to those of the actors, over several nodes too.
    ipc: within one GPU, from the learner's memory into vLLM's."""

    host = "host"
    nccl = "nccl"
    ipc = "ipc"


@dataclass
class VllmConfig:
    """How rollout.engine=vllm runs its engine; the defaults suit a CPU."""

    max_sequences: int = 256  # responses generated at once; more of them wait
    kv_cache_gib: float = 1.0  # GiB; 0 leaves the size to vLLM (gpu_memory_utilization on a GPU)
    prefix_caching: bool = True  # reuse of shared prompts; emptied at every change of weights
    compile: bool = False  # faster steps on larger models, at the price of a slower start
    tensor_parallel: int = 1  # GPUs that one engine is spread over; equals cluster.actor_gpus
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory that an engine may take

"""The DeepSpeed engine of one rank: accumulate micro-batches, step or skip, read out weights."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors import policy
from actors.low_rank import LowRank
from configs.choices import Precision, RateSchedule
from configs.schema import LearnerConfig
from learner import lora
from learner.checkpoint import TAG, BackgroundWriter
from learner.value_head import WithValueHead, policy_of


def join(rank: int, ranks: int, master: tuple[str, int], threads: int) -> None:
    """Make this process a rank: gloo on CPU, NCCL on GPU. To be called before `DeepSpeedEngine`."""
    os.environ.update(
        MASTER_ADDR=master[0], MASTER_PORT=str(master[1]), RANK=str(rank), WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",
    )  # fmt: skip
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPU DeepSpeed would compile a shared-memory all-reduce at first use: a minute, a compiler
    # to have, and nothing that gloo does not do for us.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def leave() -> None:
    """Be no rank any more."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def learning_rate(config: LearnerConfig, step: int) -> float:
    """The rate of the step that follows `step` steps: linear warm-up, then the schedule to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.updates - config.warmup)
    match config.schedule:
        case RateSchedule.linear:
            return config.lr * max(0.0, 1.0 - done)
        case RateSchedule.cosine:
            return config.lr * 0.5 * (1.0 + float(np.cos(np.pi * min(1.0, done))))
    return config.lr


class DeepSpeedEngine:
    """A network under DeepSpeed. Its own accumulation is 1: the caller marks the last micro-batch
    of a step and scales losses by ranks / global count, since DeepSpeed averages over ranks.

    `policy` is what weights are read from: the network without its value head, if it has one. What
    is frozen, beside an adapter, is neither stepped nor in a checkpoint.
    """

    def __init__(
        self, model: PreTrainedModel | WithValueHead, config: LearnerConfig, ranks: int
    ) -> None:
        import deepspeed

        self.config = config
        if config.gradient_checkpointing:
            policy_of(model).gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.Adam(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,  # one pass over memory
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._settings(ranks), dist_init_required=False
        )
        if ranks == 1 and config.zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # nobody to share gradients with
        self._parameters = list(self.engine.module.parameters())
        if config.zero_stage == 0:
            self.engine.zero_grad = self._zero_grad  # its own asks for every parameter's name
        self.policy = policy_of(self.engine.module)
        self._pieces = lora.pieces(self.policy)
        self._flat: np.ndarray | None = None
        self.writer = BackgroundWriter()
        self.engine.checkpoint_engine = self.writer

    def _settings(self, ranks: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.config.micro_batch,
            "train_batch_size": self.config.micro_batch * ranks,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": {"stage": self.config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {
                "enabled": self.config.precision is Precision.bfloat16,
                "check_grad_overflow": True,
            },
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch. A loss that is not finite makes every gradient NaN, so that
        all ranks see it and skip together."""
        self.engine.set_gradient_accumulation_boundary(last)
        if not bool(torch.isfinite(loss)):
            loss = loss * float("nan")
        self.engine.backward(loss)

    def step(self, rate: float) -> bool:
        """One optimizer step at this learning rate; False where gradients are not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.zero_stage == 0 and not self._finite():
            self.engine.zero_grad()
            return False
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def _finite(self) -> bool:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def _zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and whole shape of each parameter, in the order of `gathered`; local."""
        return [
            (p.name, p.weight.dtype, tuple(getattr(p.weight, "ds_shape", p.weight.shape)))
            for p in self._pieces
        ]

    @torch.no_grad()
    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of each parameter, in the flat array's order, one at a time, its
        adapter merged into it.

        Under ZeRO-3 a collective that holds one parameter at a time: every rank goes through it to
        the end, and a tensor is good until the next is asked for.
        """
        for piece in self._pieces:
            with self._whole(piece.parameters):
                yield piece.name, piece.whole()

    def _whole(self, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Meanwhile these parameters are whole on every rank; a collective under ZeRO-3."""
        if self.config.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters)
        )
        return gathered

    def weights(self, also: Callable[[str, Tensor], None] | None = None) -> np.ndarray:
        """All weights as `actors.policy.flatten` lays them out; see `gathered`.

        The array is one, filled anew by each call: memory that was used before is several times
        faster. also: is given each parameter on its way.
        """
        sizes = [math.prod(shape) for _, _, shape in self.layout()]
        if self._flat is None:
            self._flat = np.empty(sum(sizes), dtype=np.float32)
        flat = self._flat
        if also is None and self.config.zero_stage < 3 and not self.config.lora.rank:
            return policy.flatten(self.policy, flat)
        pieces = torch.from_numpy(flat).split(sizes)
        for (name, tensor), piece in zip(self.gathered(), pieces, strict=True):
            if also is not None:
                also(name, tensor)
            piece.copy_(tensor.reshape(-1))
        return flat

    @torch.no_grad()
    def low_rank(self, base: list[Any]) -> LowRank:
        """The adapter alone; see `weights`. base: what `actors.low_rank.LowRank` has."""
        return lora.low_rank(self._pieces, self._whole, base)

    def save(self, folder: str, state: dict[str, Any]) -> None:
        """Have the writer take what is trained, with its optimizer's state, for its next flush; all
        ranks must call it. state: plain data that comes back from `load`."""
        self.engine.save_checkpoint(
            folder, tag=TAG, client_state=state, save_latest=False,
            exclude_frozen_parameters=bool(self.config.lora.rank),
        )  # fmt: skip

    def load(self, folder: str) -> dict[str, Any]:
        """Take what `save` had written and return its state; all ranks must call it."""
        _, state = self.engine.load_checkpoint(
            folder, tag=TAG, load_module_strict=not self.config.lora.rank
        )
        if state is None:
            raise ValueError(f"{folder}: DeepSpeed finds no checkpoint there")
        found: dict[str, Any] = state
        return found

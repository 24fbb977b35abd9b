"""π_ref: its network, and its log-probabilities of the tokens taken, beside the policy's own passes
where a core may be free for them.

Shapes: N rollouts, L response columns.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors import policy
from configs.choices import Schedule
from configs.schema import Config
from learner import lora
from learner.batch import Padded
from learner.packing import check_boundaries, response_logps
from learner.stages.bandit import initial_policy

REFERENCE = "reference_logp_K"


def frozen(config: Config, device: torch.device) -> nn.Module:
    """The initial network, not to be trained."""
    path, precision = initial_policy(config), config.learner.precision
    model = policy.load_pretrained(config.policy, path, precision)
    return nn.Module.to(model.eval().requires_grad_(False), device)


class Reference:
    """A network of its own, or the policy's without its adapter."""

    def __init__(self, config: Config, trained: Any, device: torch.device) -> None:
        # A rank's forward passes are collectives under ZeRO-3: there π_ref is always its own.
        shares = bool(config.learner.lora.rank) and config.learner.zero_stage < 3
        self.network = lora.WithoutAdapter(trained) if shares else frozen(config, device)
        self.packing = config.learner.packing
        if self.packing:
            check_boundaries(self.network, int(trained.config.vocab_size))
        beside = config.replay.schedule is Schedule.pipelined and config.cluster.threads == 1
        self._under_way: dict[int, Future[Tensor]] = {}  # by the identity of a step's part
        self._beside: ThreadPoolExecutor | None = None
        if beside and device.type == "cpu" and not shares:
            self._beside = ThreadPoolExecutor(1, "reference", torch.set_num_threads, (1,))

    def weights(self) -> np.ndarray:
        """π_ref's, flat."""
        if isinstance(self.network, lora.WithoutAdapter):
            return policy.flatten(self.network.base())
        return policy.flatten(self.network)

    def begin(self, parts: Iterable[Padded | None]) -> None:
        """A step's micro-batches, each of which `logps` will be asked for.

        Pipelined on a CPU, where the policy has one thread, another begins with them beside its
        passes: while the run waits for the learner, an actor's core is free. On a GPU, with more
        threads, and in lockstep, where all cores may be the policy's, it would only take turns.
        """
        self._under_way.clear()
        if self._beside is not None:
            for part in parts:
                if part is not None and REFERENCE not in part.derived_NL:
                    self._under_way[id(part)] = self._beside.submit(self._taken, part)

    def logps(self, part: Padded) -> Tensor:
        """log π_ref of a micro-batch's tokens taken, [N, L], which the part keeps."""
        if REFERENCE not in part.derived_NL:
            begun = self._under_way.pop(id(part), None)
            part.derived_NL[REFERENCE] = begun.result() if begun else self._taken(part)
        return part.derived_NL[REFERENCE]

    @torch.no_grad()
    def _taken(self, part: Padded) -> Tensor:
        return response_logps(self.network, part, self.packing)

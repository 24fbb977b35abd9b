"""TRL's RLOO and online DPO as `bench trl` runs them, their first step held beside our losses.

A trainer's first step is not timed. In it our objective gets the very tensors that TRL's loss gets,
and both gradients in the network's weights are compared (at age 0 the value of RLOO's loss is 0
whatever one does; its gradient is not).
"""

import contextlib
import importlib
import io
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from configs.choices import Advantage, Ratio
from configs.schema import ObjectiveConfig
from learner.objectives import load
from learner.objectives.base import LossInputs, pair_masks

RLOO = ObjectiveConfig(name="ppo", ratio=Ratio.sequence, advantage=Advantage.leave_one_out)
DPO = ObjectiveConfig(name="dpo", beta=0.1)


class Clock:
    """Times of TRL's steps, and how far the first one's gradient is from ours."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.apart = float("nan")  # largest difference, as a share of the largest entry

    def compare(self, ours: list[Tensor], model: nn.Module) -> None:
        theirs = [p.grad for p in model.parameters() if p.grad is not None]
        largest = max(float(g.abs().max()) for g in theirs)
        pairs = zip(ours, theirs, strict=True)
        self.apart = max(float((a - b).abs().max()) for a, b in pairs) / largest

    def rate(self, responses: int) -> float:
        """Responses per second, from the second step on."""
        return responses * (len(self.times) - 1) / (self.times[-1] - self.times[0])


def _gradient(
    settings: ObjectiveConfig, inputs: LossInputs, terms: int, model: nn.Module
) -> list[Tensor]:
    loss = load(settings.name).loss(inputs, settings) / terms
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def rloo_trainer() -> type:
    """RLOOTrainer that keeps our gradient of its first step."""
    utils = importlib.import_module("trl.import_utils")
    with patch.object(utils, "is_vllm_available", lambda min_version=None: False):
        from trl.trainer.rloo_trainer import RLOOTrainer

    class Rloo(RLOOTrainer):  # type: ignore[misc]
        ours: list[Tensor] | None = None

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            if self.ours is None:
                self.ours = _of_rloo(model, inputs)
            return super()._compute_loss(model, inputs)

    return Rloo


def _of_rloo(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Our gradient of TRL's batch."""
    token_NL, mask_NL = inputs["completion_ids"], inputs["completion_mask"].bool()
    text_NT = torch.cat([inputs["prompt_ids"], token_NL], 1)
    there_NT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    outputs = model(text_NT, attention_mask=there_NT)
    logits_NLV = outputs.logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]
    logp_NL = logits_NLV.log_softmax(-1).gather(-1, token_NL[..., None])[..., 0]
    spread_N1 = (inputs["old_logps"] / mask_NL.sum(1))[:, None]  # a sequence's ratio reads the sum
    valid_N = torch.ones(len(token_NL), dtype=torch.bool)
    given = LossInputs(
        logp_NL, mask_NL, valid_N, 1, generator_logp_NL=spread_N1.expand_as(logp_NL),
        leave_one_out_N=inputs["advantages"],
    )  # fmt: skip
    return _gradient(RLOO, given, len(token_NL), model)


def online_dpo_trainer() -> type:
    """OnlineDPOTrainer that keeps our gradient of its first step."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    class OnlineDpo(OnlineDPOTrainer):  # type: ignore[misc]
        ours: list[Tensor] | None = None

        def _forward(self, model: nn.Module, *rest: Any) -> Tensor:
            scores_NL = super()._forward(model, *rest)
            if model is self.ref_model:
                self.reference_NL = scores_NL
            else:
                self.logp_NL, self.mask_NL = scores_NL, rest[3].bool()
            return scores_NL

        def _calculate_rewards_from_functions(self, *args: Any, **more: Any) -> Tensor:
            reward_N = super()._calculate_rewards_from_functions(*args, **more)
            if self.ours is None:  # TRL has all first responses, then all second ones
                pair_N = torch.arange(len(reward_N)).view(2, -1).t().flatten()
                valid_N = torch.ones(len(reward_N), dtype=torch.bool)
                given = LossInputs(
                    self.logp_NL[pair_N], self.mask_NL[pair_N], valid_N, 2,
                    reference_logp_NL=self.reference_NL[pair_N], score_N=reward_N[pair_N],
                )  # fmt: skip
                pairs = int(pair_masks(reward_N[pair_N], valid_N, 2).sum())
                assert self.model is not None
                self.ours = _gradient(DPO, given, pairs, self.model)
            return reward_N

    return OnlineDpo


def race(trainer_class: type, settings: Any, score: Callable[..., Any], **more: Any) -> Clock:
    """Train to the end of `settings`; TRL's own printing is swallowed."""
    from transformers import TrainerCallback

    clock = Clock()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **more: Any) -> None:
            if not clock.times:
                clock.compare(trainer.ours, more["model"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.times.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return score([], completion_ids)

    trainer: Any = trainer_class(args=settings, reward_funcs=reward, callbacks=[Watch()], **more)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock

"""Evaluation, apart from training: fresh rollouts of exactly the version asked for.

It has its own random stream and stands outside the ledger. It also samples the offline data set
from π_ref, where a run asks for one.
"""

from typing import Any

import numpy as np
import torch

from actors import policy
from actors.actor import RewardClient, score
from actors.engine import Request
from actors.low_rank import LowRank
from actors.preferences import from_rollouts, write_parquet
from actors.rollout import VALID, GroupId, Rollouts, Version
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.schema import Config
from learner.batch import conditionals, pad, token_logps
from learner.divergence import kl_to_reference
from learner.replay.clients import received
from reward_server.rewards import InProcess

GROUPS_AT_ONCE = 64


class Evaluator:
    """Runs as a Ray actor. `start` gives it π_ref, which is version 0.

    gold: the identity of the gold reward, empty where there is none, which it loads into this
    process; RuntimeError where the files here have another.
    """

    def __init__(self, config: Config, gold: str = "") -> None:
        self.config = config
        self.engine = TorchEngine(config)
        self.prompts = inputs.prompts(config)
        self.gold = InProcess(config.gold, identity=gold) if gold else None

    def start(self, rewards: RewardClient, initial: np.ndarray) -> None:
        """Take the reward service and π_ref's weights."""
        self.rewards = rewards
        self.reference = policy.to_sample(self.config)
        policy.unflatten(self.reference, initial)
        torch.nn.Module.to(self.reference, self.engine.device)

    def evaluate(
        self, version: Version, weights: np.ndarray | LowRank, number: int
    ) -> dict[str, Any]:
        """reward_eval, its standard error, response length and KL to π_ref of fresh rollouts, and
        reward_gold with its standard error of the same ones.

        number: of the evaluation in this run; each has draws of its own.
        """
        self.engine.load(received(weights, self.config.limits.wait_seconds), version)
        groups = -(-self.config.eval.samples // self.config.rollout.responses_per_prompt)
        block = self._rollouts(range(number * groups, (number + 1) * groups), "eval")
        valid = (block.status_N == VALID)[: self.config.eval.samples]
        reward = block.reward_N[: self.config.eval.samples][valid]
        if not len(reward):
            why = next(iter(block.failures.values()), "no reason stated")
            return {"eval_failures": int((~valid).sum()), "eval_failure": why}
        return {
            "reward_eval": float(reward.mean()),
            "reward_eval_error": float(reward.std() / np.sqrt(len(reward))),
            "eval_failures": int((~valid).sum()),
            "eval_length": float(block.length_N.mean()),
            "eval_kl_to_reference": self._kl_to_reference(block),
            **self._gold(block, np.flatnonzero(valid)),
        }

    def _gold(self, block: Rollouts, rollouts: np.ndarray) -> dict[str, Any]:
        """The gold reward of these rollouts; absent where there is none, or all failed."""
        if self.gold is None:
            return {}
        prompts = [block.prompt(n // block.members).tolist() for n in rollouts]
        scores = self.gold.score(prompts, [block.response(n).tolist() for n in rollouts])
        known = scores.reward[~np.isnan(scores.reward)]
        failed: dict[str, Any] = {"gold_failures": len(scores.failures)}
        if scores.failures:
            failed["gold_failure"] = next(iter(scores.failures.values()))
        if not len(known):
            return failed
        error = float(known.std() / np.sqrt(len(known)))
        return {"reward_gold": float(known.mean()), "reward_gold_error": error, **failed}

    def _rollouts(self, positions: range, stream: str) -> Rollouts:
        """Scored groups for the prompts at these positions."""
        requests = [Request(GroupId(p, 0), self.prompts[p]) for p in positions]
        block = self.engine.generate(requests, stream)
        score(block, self.rewards, self.config.limits.wait_seconds)
        return block

    @torch.inference_mode()
    def _kl_to_reference(self, block: Rollouts) -> float:
        """KL(π_θ‖π_ref) on π_θ's own samples, nats per token (k3)."""
        batch = pad(block, self.engine.device)
        reference_NL = token_logps(conditionals(self.reference, batch), batch)
        kl_NL = kl_to_reference(batch.logp_NL, batch.logp_NL, reference_NL, batch.mask_NL)
        return float(kl_NL.sum() / batch.mask_NL.sum())

    def sample_dataset(self, weights: np.ndarray, path: str) -> int:
        """Write `data.prompts` scored groups of π_ref, labelled good over the median reward.

        Returns how many groups had no failed rollout, and so were written.
        """
        self.engine.load(weights, Version(0, 0))
        groups = []
        for start in range(0, self.config.data.prompts, GROUPS_AT_ONCE):
            stop = min(start + GROUPS_AT_ONCE, self.config.data.prompts)
            block = self._rollouts(range(start, stop), "offline")
            for group in range(block.groups):
                part = block.select(group, group + 1)
                if not part.failures:
                    groups.append(part)
        if not groups:
            raise RuntimeError("no response of π_ref could be scored; there is no offline data")
        median = np.median(np.concatenate([part.reward_N for part in groups]))
        for part in groups:
            part.label_N = (part.reward_N > median).astype(np.int8)
        write_parquet(path, [from_rollouts(part)[0] for part in groups])
        return len(groups)

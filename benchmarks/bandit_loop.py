"""Algorithm 1 on the bandit as one would write it in a single process: transformers, torch, Adam.

It does a run's work and nothing else: responses by `forward` with a KV cache, analytic reward, T
passes over the B samples in minibatches of M, at each step the divergences that the learner
measures (KL to and from π_gen and to π_ref, exact at each prefix, and the ESS), and evaluations.
π_gen's distributions are kept from generation and π_ref's are computed once a round, so no forward
pass is made that a careful author would save. No version, no queue, no file. Shapes: N rollouts, L
response tokens, V vocabulary, G groups of C.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.schema import Config, ObjectiveConfig
from learner.stages.bandit import initial_policy


@dataclass
class Samples:
    """A round's rollouts. Distributions are log-probabilities."""

    prompt_N1: Tensor
    token_NL: Tensor
    reward_N: Tensor
    generator_NLV: Tensor
    reference_NLV: Tensor

    def rows(self, start: int, stop: int) -> "Samples":
        """Rollouts start … stop − 1."""
        return Samples(*(column[start:stop] for column in vars(self).values()))


class BareLoop:
    """One network, one optimizer, and nothing around them; on one thread."""

    def __init__(self, config: Config, prompts: list[int]) -> None:
        """prompts: the contexts, in their order."""
        self.config, self.prompts = config, prompts
        path = initial_policy(config)
        self.model = AutoModelForCausalLM.from_pretrained(path).train()
        self.reference = AutoModelForCausalLM.from_pretrained(path).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learner.lr)
        self.measured: list[dict[str, float]] = []
        self.evaluated: list[dict[str, float]] = []
        self.seconds = {"generate": 0.0, "step": 0.0, "evaluate": 0.0}
        self.taken = 0

    def run(self, updates: int) -> float:
        """Seconds for so many updates more, evaluations among them as `eval.every` has them."""
        torch.set_num_threads(1)
        started = time.perf_counter()
        self._timed("evaluate", self._evaluate)
        steps, minibatch = self.config.steps_per_round, self.config.learner.minibatch
        last = self.taken + updates
        while self.taken < last:
            samples = self._timed("generate", self.sample, self.config.groups_per_round)
            for step in range(min(steps, last - self.taken)):
                start = step * minibatch % len(samples.reward_N)
                self._timed("step", self.update, samples.rows(start, start + minibatch))
                self.taken += 1
                if self.taken % max(1, self.config.eval.every) == 0 or self.taken == last:
                    self._timed("evaluate", self._evaluate)
        return time.perf_counter() - started

    def _timed(self, part: str, call: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = call(*arguments)
        self.seconds[part] += time.perf_counter() - started
        return answer

    @torch.no_grad()
    def sample(self, groups: int) -> Samples:
        """C scored responses to each of so many prompts."""
        chosen = [self.prompts[group % len(self.prompts)] for group in range(groups)]
        members, prompts = self.config.rollout.responses_per_prompt, torch.tensor(chosen)
        prompt_N1 = prompts.repeat_interleave(members)[:, None]
        inputs, cache, tokens, distributions = prompt_N1, None, [], []
        for _ in range(self.config.rollout.max_tokens):
            out = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logp_NV = out.logits[:, -1].log_softmax(-1)
            inputs = torch.multinomial(logp_NV.exp(), 1)
            tokens.append(inputs)
            distributions.append(logp_NV)
        token_NL = torch.cat(tokens, 1)
        centre, width = self.config.reward.centre, self.config.reward.width
        reward_N = torch.exp(-(((token_NL - centre) / width) ** 2)).mean(1)
        reference_NLV = self.distributions(self.reference, prompt_N1, token_NL)
        return Samples(prompt_N1, token_NL, reward_N, torch.stack(distributions, 1), reference_NLV)

    def distributions(self, model: Any, prompt_N1: Tensor, token_NL: Tensor) -> Tensor:
        """log π(· | prefix) before each response token, [N, L, V]."""
        inputs_NL = torch.cat([prompt_N1, token_NL[:, :-1]], 1)
        out: Tensor = model(inputs_NL, use_cache=False).logits.log_softmax(-1)
        return out

    def update(self, part: Samples) -> float:
        """A gradient step on a minibatch and its measures; returns the loss."""
        now_NLV = self.distributions(self.model, part.prompt_N1, part.token_NL)
        value = loss(now_NLV, part, self.config)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.measured.append(measures(now_NLV.detach(), part))
        return float(value.detach())

    def _evaluate(self) -> None:
        """Reward, its standard error and KL to π_ref (k3) of fresh samples."""
        members, samples = self.config.rollout.responses_per_prompt, self.config.eval.samples
        fresh = self.sample(-(-samples // members))
        ratio_NL = taken(fresh.reference_NLV, fresh) - taken(fresh.generator_NLV, fresh)
        reward_N = fresh.reward_N[:samples]
        self.evaluated.append({
            "reward_eval": float(reward_N.mean()),
            "reward_eval_error": float(reward_N.std(correction=0) / len(reward_N) ** 0.5),
            "eval_kl_to_reference": float((ratio_NL.expm1() - ratio_NL).mean()),
        })  # fmt: skip


def taken(logp_NLV: Tensor, part: Samples) -> Tensor:
    """log π of the tokens, [N, L]."""
    return logp_NLV.gather(-1, part.token_NL[..., None])[..., 0]


def loss(now_NLV: Tensor, part: Samples, config: Config) -> Tensor:
    """IPO over all pairs of a group with different rewards (arXiv 2310.12036, equation 17), or
    best-of-N's −log π_θ of each group's best."""
    members, settings = config.rollout.responses_per_prompt, config.objective
    logp_GC = taken(now_NLV, part).sum(-1).view(-1, members)
    reward_GC = part.reward_N.view(-1, members)
    if settings.name == "best_of_n":
        return -logp_GC.gather(1, reward_GC.argmax(1, keepdim=True)).mean()
    reference_GC = taken(part.reference_NLV, part).sum(-1).view(-1, members)
    return _ipo(logp_GC - reference_GC, reward_GC, settings)


def _ipo(log_ratio_GC: Tensor, reward_GC: Tensor, settings: ObjectiveConfig) -> Tensor:
    margin_GCC = log_ratio_GC[:, :, None] - log_ratio_GC[:, None, :]
    wins_GCC = reward_GC[:, :, None] > reward_GC[:, None, :]
    off_GCC = (margin_GCC - 0.5 / settings.tau).square() * wins_GCC
    return off_GCC.sum() / wins_GCC.sum().clamp(min=1)


@torch.no_grad()
def measures(now_NLV: Tensor, part: Samples) -> dict[str, float]:
    """Divergences in nats per token, exact at each prefix, and the ESS of whole responses."""
    generator_NLV, reference_NLV = part.generator_NLV, part.reference_NLV
    now_probability_NLV = now_NLV.exp()
    ratio_N = (taken(now_NLV, part) - taken(generator_NLV, part)).double().sum(-1).exp()
    to_generator_NL = (now_probability_NLV * (now_NLV - generator_NLV)).sum(-1)
    from_generator_NL = (generator_NLV.exp() * (generator_NLV - now_NLV)).sum(-1)
    to_reference_NL = (now_probability_NLV * (now_NLV - reference_NLV)).sum(-1)
    return {
        "kl_to_generator": float(to_generator_NL.mean()),
        "kl_from_generator": float(from_generator_NL.mean()),
        "kl_to_reference": float(to_reference_NL.mean()),
        "ess": float(ratio_N.sum() ** 2 / (len(ratio_N) * ratio_N.square().sum())),
    }

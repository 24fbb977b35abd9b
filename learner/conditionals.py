"""Exact next-token distributions of π_gen and π_ref, for models small enough to evaluate both.

No distributions travel through the queue: the learner keeps the weight versions that queued
rollouts may still carry, and evaluates them at a rollout's first consumption. Later passes over it
find the result here.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from actors import policy
from actors.rollout import Version
from configs.choices import DataSource
from configs.schema import Config
from learner.batch import Padded, RolloutKey, frozen_conditionals

LARGEST_BYTES = 256_000_000  # of distributions kept for one round, when `exact_kl` is not set


def affordable(config: Config, vocabulary: int) -> bool:
    """Whether `learner.exact_kl` holds: as set, else by the bytes that a round would take, and not
    of packed rows, which have no distributions laid out by rollout."""
    if config.learner.exact_kl is not None:
        return config.learner.exact_kl
    values = config.replay.samples_per_round * config.rollout.max_tokens * vocabulary
    affords = config.learner.zero_stage < 3 and not config.learner.packing
    return affords and 2 * 4 * values <= LARGEST_BYTES


class Conditionals:
    """π_gen's and π_ref's distributions at the prefixes of the round in use, [L, V] a rollout."""

    def __init__(self, config: Config, scratch: nn.Module, reference: nn.Module) -> None:
        self.offline = config.data.source is DataSource.offline
        self.max_age = config.replay.max_age or 0
        self.passes = config.replay.inner_epochs
        self.scratch = scratch  # a network of the policy's architecture, for older versions
        self.reference = reference
        self.weights: dict[Version, np.ndarray] = {}
        self.loaded: Version | None = None
        self._generator, self._reference = _Kept(), _Kept()

    def remember(self, version: Version, weights: np.ndarray) -> None:
        """Keep a published version for as long as a rollout within the budget may carry it."""
        self.weights[version] = weights.copy()
        for old in [v for v in self.weights if v.step < version.step - self.max_age]:
            if any(
                v.step > old.step and v.step <= version.step - self.max_age for v in self.weights
            ):
                del self.weights[old]

    def start_round(self) -> None:
        """Forget the distributions of the round before."""
        self._generator, self._reference = _Kept(), _Kept()

    @torch.no_grad()
    def of_reference(self, batch: Padded) -> Tensor:
        """log π_ref(· | prefix), [N, L, V]."""
        return self._found(
            self._reference, batch, lambda: frozen_conditionals(self.reference, batch)
        )

    @torch.no_grad()
    def of_generator(self, batch: Padded, current: Version, now_NLV: Tensor) -> Tensor | None:
        """log π_gen(· | prefix), each at its token's version, [N, L, V]; None where unknown.

        now_NLV: the same of the `current` weights, which is what age 0 needs.
        """
        if self.offline:
            return None
        try:
            return self._found(
                self._generator, batch, lambda: self._mixture(batch, current, now_NLV)
            )
        except KeyError:
            return None

    def _mixture(self, batch: Padded, current: Version, now_NLV: Tensor) -> Tensor:
        versions = batch.versions()
        out_NLV = torch.zeros_like(now_NLV)
        for version in versions:
            at_version_NLV = now_NLV if version == current else self._at(batch, version)
            if len(versions) == 1:
                return at_version_NLV
            here_NL = torch.from_numpy(batch.step_NL == version.step).to(out_NLV.device)
            out_NLV = torch.where(here_NL.unsqueeze(-1), at_version_NLV, out_NLV)
        return out_NLV

    def _at(self, batch: Padded, version: Version) -> Tensor:
        if self.loaded != version:
            policy.unflatten(self.scratch, self.weights[version])
            self.loaded = version
        return frozen_conditionals(self.scratch, batch)

    def _found(self, kept: "_Kept", batch: Padded, compute: Callable[[], Tensor]) -> Tensor:
        """From what is kept by rollout, else computed, and kept if another pass will want it."""
        found = kept.find(batch.keys)
        if found is None:
            found = compute()
            if self.passes > 1:
                kept.keep(batch.keys, found)
        return found


class _Kept:
    """Distributions of a round's rollouts, [L, V] each."""

    def __init__(self) -> None:
        self.of: dict[RolloutKey, Tensor] = {}
        self.last: tuple[list[RolloutKey], Tensor] | None = None

    def find(self, keys: list[RolloutKey]) -> Tensor | None:
        """These rollouts', [N, L, V]; None where one is missing."""
        if self.last is not None and self.last[0] == keys:  # the same minibatch again
            return self.last[1]
        if all(key in self.of for key in keys):
            return torch.stack([self.of[key] for key in keys])
        return None

    def keep(self, keys: list[RolloutKey], found: Tensor) -> None:
        self.of.update(zip(keys, found))
        self.last = keys, found

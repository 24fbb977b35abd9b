"""One learner rank: from a batch to an optimizer step, with the measure of how on-policy it was.

No Ray here: the queue and where weights go are handed in, so the same code serves the Ray actor,
the tests and the benchmarks' bare loops.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors import policy, probe
from actors.probe import Probe
from actors.randomness import stream_key
from actors.rollout import Rollouts, Version
from configs import faults
from configs.choices import Advantage, DataSource, Proximal, Schedule
from configs.schema import Config
from learner import advantages, lora, measures
from learner.batch import Padded, distributions, forward, pad, token_logps, unpad, values
from learner.cells import Cells, StepRecord, add
from learner.conditionals import Conditionals, affordable
from learner.describe import describe, readable
from learner.engine import DeepSpeedEngine, learning_rate
from learner.kl_control import KlController
from learner.micro_batches import micro_batches
from learner.objectives import load
from learner.objectives.terms import whole_loss
from learner.packing import logps_and_values
from learner.reference import REFERENCE, Reference, frozen
from learner.replay.records import Batch
from learner.signals import Signals, signals
from learner.stages.bandit import initial_policy
from learner.value_head import WithValueHead, weightless

PROXIMAL = "proximal_logp_K"


class Learner:
    """A rank's networks and the update. `consume` is the whole of it."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.objective = load(config.objective.name)
        path = initial_policy(config)
        precision = config.learner.precision
        model = policy.load_pretrained(config.policy, path, precision)
        lora.attach(model, config.learner.lora, config.seed, "learner.lora")
        self.version = Version(0, 0)
        self.has_values = config.objective.advantage is Advantage.gae
        network = WithValueHead(model, config.objective.value) if self.has_values else model
        self.engine = DeepSpeedEngine(network.train(), config.learner, config.learner.ranks)
        self.kl = KlController(config.objective)
        self.reference = Reference(config, self.engine.policy, self.engine.device)
        self.conditionals: Conditionals | None = None
        if affordable(config, int(model.config.vocab_size)):
            scratch = frozen(config, self.engine.device)
            self.conditionals = Conditionals(config, scratch, self.reference.network)
        self.round = -1
        context = policy.context(config, model.config)
        self._probe_NT = probe.text(config.seed, int(model.config.vocab_size), context)

    def weights(self, also: Callable[[str, Tensor], None] | None = None) -> np.ndarray:
        """The current weights, flat; collective under ZeRO-3. Kept for measuring KL, too.

        The array is filled anew by the next call. also: is given each parameter on its way.
        """
        flat = self.engine.weights(also)
        self.remember(self.version, flat)
        return flat

    def remember(self, version: Version, flat: np.ndarray) -> None:
        """Keep published weights for measuring KL, where it is exact."""
        if self.conditionals is not None:
            self.conditionals.remember(version, flat)

    def probe(self) -> Probe | None:
        """The probe under the current weights, to be published with them; collective under ZeRO-3,
        elsewhere rank 0's alone. None where the context is too short for one."""
        gathers = self.config.learner.zero_stage == 3
        if self._probe_NT.shape[1] < 2 or (self.rank and not gathers):
            return None
        network = self.engine.engine if gathers else self.engine.engine.module
        network.eval()
        logp_NL = policy.score(
            lambda token_NT: network(token_NT, use_cache=False).logits, self._probe_NT,
            self.engine.device,
        )  # fmt: skip
        network.train()
        return Probe(self._probe_NT, logp_NL)

    def consume(self, batch: Batch) -> tuple[StepRecord, dict[str, np.ndarray]]:
        """One optimizer step on a batch, or none where it is not finite.

        Returns the record and the columns that this rank derived, for the queue to keep.
        """
        started = time.perf_counter()
        dropout = stream_key(self.config.seed, f"dropout/{batch.number}/{self.rank}")
        self._seed(dropout >> 1)
        if self.conditionals is not None and batch.round != self.round:
            self.conditionals.start_round()
        first_pass, self.round = batch.round != self.round, batch.round
        index = batch.index
        notes = signals(
            index.reward_M, index.label_M, index.valid_M, self.config.rollout.responses_per_prompt,
            batch.round_rewards, self.config.objective,
            batch.number / max(1, self.config.learner.updates - 1),
        )  # fmt: skip
        kl = self.kl.coefficient
        loss, cells, derived = self._accumulate(batch, notes)
        rate = learning_rate(self.config.learner, self.version.step)
        faults.hit("learner.step.before")
        stepped = self.engine.step(rate)
        if stepped:
            self.version = Version(self.version.lineage, self.version.step + 1)
            if _is_fresh(batch):
                self.kl.stepped(cells, self.engine.device)
        record = StepRecord(
            batch=batch.number,
            round=batch.round,
            version=self.version,
            stepped=stepped,
            loss=loss,
            cells=cells,
            index=describe(index) if self.rank == 0 else {},
            rate=rate,
            kl_coefficient=kl if self.config.objective.kl_reward else None,
            seconds={"step": time.perf_counter() - started},
            samples=self._samples(batch) if first_pass and self.rank == 0 else [],
            queue=batch.measures,
        )
        return record, derived

    def _seed(self, value: int) -> None:
        """`torch.manual_seed` without the stack traces that it keeps for devices not there."""
        torch.default_generator.manual_seed(value)
        if self.engine.device.type == "cuda":
            torch.cuda.manual_seed_all(value)

    def _accumulate(
        self, batch: Batch, notes: Signals
    ) -> tuple[float, Cells, dict[str, np.ndarray]]:
        """Backward over the rank's slice in equally many micro-batches on every rank."""
        places = micro_batches(batch.index, self.config, self.rank)
        loss, tables, columns = 0.0, [], []
        counts = notes.count(self.objective.traits.per), notes.count("rollout")
        whole = pad(batch.block, str(self.engine.device)) if batch.block is not None else None
        parts = [
            whole.take(here - batch.first) if whole is not None and len(here) else None
            for here in places
        ]
        if self.conditionals is None:
            self.reference.begin(parts)
        if self.has_values and _is_fresh(batch):
            self._derive_advantages(parts, [notes.take(here).reward_N for here in places])
        for number, (part, here) in enumerate(zip(parts, places), start=1):
            last = number == len(parts)
            if part is None:
                self._fill_up(last)
                continue
            value, table, derived = self._micro_batch(
                part, notes.take(here), counts, last,
                np.where(batch.index.offline, -1, batch.index.age_M[here]),
                batch.index.reuse_M[here],
            )  # fmt: skip
            loss += value
            tables.append(table)
            columns.append(derived)
        order_N = np.concatenate(places) - batch.first
        return loss, add(tables), _packed(columns, order_N, batch.block)

    def _derive_advantages(self, parts: list[Padded | None], reward_N: list[Tensor]) -> None:
        """Values, returns and advantages at first use, put among each micro-batch's columns."""
        columns = advantages.derive(
            self.engine.engine, parts, [r_N.to(self.engine.device) for r_N in reward_N],
            lambda part: self._reference(part)[0], self.config, self.kl.coefficient,
        )  # fmt: skip
        for part, derived in zip(parts, columns):
            if part is not None:
                part.derived_NL.update(derived)

    def _micro_batch(
        self, part: Padded, notes: Signals, counts: tuple[int, int], last: bool,
        age_N: np.ndarray, reuse_N: np.ndarray,
    ) -> tuple[float, Cells, dict[str, Tensor]]:  # fmt: skip
        generator_NLV = detached_NLV = None
        if self.conditionals is None:
            packing = self.config.learner.packing
            logp_NL, value_NL = logps_and_values(self.engine.engine, part, packing)
        else:
            outputs = forward(self.engine.engine, part)
            now_NLV, value_NL = distributions(outputs.logits, part), values(outputs, part)
            logp_NL, detached_NLV = token_logps(now_NLV, part), now_NLV.detach()
            generator_NLV = self.conditionals.of_generator(part, self.version, detached_NLV)
        logp_NL.retain_grad()
        known = not bool(torch.isnan(part.logp_NL).any())
        reference_NL, reference_NLV = self._reference(part)
        derived = {REFERENCE: reference_NL}
        if self.config.objective.proximal is Proximal.first_use:
            derived[PROXIMAL] = part.derived_NL.get(PROXIMAL, logp_NL.detach())
        inputs = notes.loss_inputs(
            logp_NL, part.mask_NL, part.logp_NL if known else None, reference_NL,
            derived.get(PROXIMAL),
        )  # fmt: skip
        if value_NL is not None:
            derived |= {name: part.derived_NL[name] for name in advantages.COLUMNS}
            inputs = advantages.with_values(inputs, value_NL, part)
        value = whole_loss(self.objective, inputs, self.config.objective, *counts)
        self.engine.accumulate(value * self.config.learner.ranks, last)
        gradient_NL = logp_NL.grad if logp_NL.grad is not None else torch.zeros_like(logp_NL)
        inputs.logp_NL = logp_NL.detach()
        table = measures.measure(
            inputs, gradient_NL / self.config.learner.ranks, age_N, reuse_N,
            (detached_NLV, generator_NLV, reference_NLV), self.config.objective,
        )  # fmt: skip
        return float(value.detach()), table, derived

    def _fill_up(self, last: bool) -> None:
        """A micro-batch of weight zero, so that every rank runs equally many."""
        tokens = torch.zeros((1, 2), dtype=torch.long, device=self.engine.device)
        self.engine.accumulate(weightless(self.engine.engine(tokens, use_cache=False)), last)

    @torch.no_grad()
    def _reference(self, part: Padded) -> tuple[Tensor, Tensor | None]:
        """log π_ref of the tokens taken [N, L], and its distributions where they are kept."""
        if self.conditionals is None:
            return self.reference.logps(part), None
        reference_NLV = self.conditionals.of_reference(part)
        if REFERENCE not in part.derived_NL:
            part.derived_NL[REFERENCE] = token_logps(reference_NLV, part)
        return part.derived_NL[REFERENCE], reference_NLV

    def _samples(self, batch: Batch) -> list[dict[str, Any]]:
        if batch.block is None:
            return []
        count = min(self.config.run.samples_per_round, batch.block.groups)
        return [readable(batch.block, group, batch.round) for group in range(count)]

    def publishes(self, number: int) -> bool:
        """Whether actors need the version that this batch makes."""
        if self.config.data.source is DataSource.offline:
            return False
        if self.config.replay.schedule is Schedule.pipelined or self.config.replay.lag:
            return True
        return (number + 1) % self.config.steps_per_round == 0

    def evaluates(self, number: int) -> bool:
        """Whether the version that this batch makes is evaluated."""
        every, done = self.config.eval.every, number + 1
        return done == self.config.learner.updates or (every > 0 and done % every == 0)


def _is_fresh(batch: Batch) -> bool:
    """Whether it is a first pass; the same on all ranks."""
    return bool((batch.index.reuse_M == 1).any())


def _packed(
    columns: list[dict[str, Tensor]], order_N: np.ndarray, block: Rollouts | None
) -> dict[str, np.ndarray]:
    """The micro-batches' derived columns, of those that the block does not bring already.

    order_N: the place in the block of each of their rollouts.
    """
    if block is None or not columns:
        return {}
    new = [name for name in columns[0] if name not in block.derived]
    back = torch.from_numpy(np.argsort(order_N))
    whole = {name: torch.cat([c[name] for c in columns]).cpu()[back] for name in new}
    return {name: unpad(value_NL, block.length_N) for name, value_NL in whole.items()}

"""The range that each number may be in, and how fixes are worded."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass

from configs.errors import ConfigError, shown
from configs.schema import Config

Rule = Callable[[Config], None]


@dataclass(frozen=True)
class Bound:
    """An interval. `inside` is a usual value, offered where an open end has no nearest one."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    inside: float = 1

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def nearest(self, value: float) -> float:
        """The value to set instead."""
        end, is_open = (self.low, self.open_low) if value <= self.low else (
            self.high, self.open_high)  # fmt: skip
        return self.inside if is_open else end

    def __str__(self) -> str:
        low = f"{'over' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'under' if self.open_high else 'at most'} {self.high:g}"
        ends = [text for text, end in ((low, self.low), (high, self.high)) if math.isfinite(end)]
        return " and ".join(ends)


def _over_zero(inside: float) -> Bound:
    return Bound(0, open_low=True, inside=inside)


_ONE_UP, _ZERO_UP, _FRACTION = Bound(1), Bound(0), Bound(0, 1, open_high=True, inside=0.9)

_GROUPS: dict[Bound, str] = {
    _ONE_UP: """policy.bandit.vocabulary policy.bandit.layers policy.bandit.heads
        policy.bandit.width policy.bandit.draws rollout.actors rollout.responses_per_prompt
        rollout.max_tokens rollout.lease reward.replicas reward.batch reward.max_request_bytes
        reward.batch_tokens
        replay.samples_per_round replay.inner_epochs data.prompts learner.minibatch
        learner.updates learner.ranks rollout.vllm.max_sequences eval.samples
        rollout.concurrent_leases limits.failure_window cluster.threads
        objective.importance_cap checkpoint.keep limits.prompt_attempts
        limits.skipped_steps
        rollout.vllm.tensor_parallel length_data.mode length_data.sft length_data.pairs
        length_data.layers length_data.heads length_data.width prompts.buffer
        data.buffer learner.lora.alpha""",
    _ZERO_UP: """run.samples_per_round pipeline.seed policy.bandit.seed prompts.count
        prompts.max_tokens
        replay.max_age replay.lag learner.micro_batch learner.micro_tokens
        learner.warmup learner.weight_decay
        learner.max_grad_norm eval.every limits.actor_restarts cluster.actor_cpus
        rollout.vllm.kv_cache_gib
        cluster.learner_cpus cluster.learner_gpus cluster.actor_gpus cluster.evaluator_gpus
        cluster.reward_gpus cluster.evaluator_cpus cluster.reward_cpus reward.target
        cluster.metrics_seconds
        checkpoint.every checkpoint.seconds limits.backoff_seconds limits.learner_restarts
        limits.queue_restarts limits.evaluator_restarts objective.value.coefficient
        objective.kl_reward objective.kl_loss learner.lora.rank""",
    _FRACTION: """objective.quantile_start objective.quantile_end learner.beta1 learner.beta2
        length_data.prompt_effect learner.lora.dropout""",
    _over_zero(1.0): "rollout.temperature reward.scale cluster.gpu_gib",
    _over_zero(0.2): "objective.value.epsilon",
    _over_zero(6.0): "objective.kl_target",
    _over_zero(10_000.0): "objective.kl_horizon",
    _over_zero(0.4): "policy.bandit.scale length_data.spread",
    _over_zero(4.0): "length_data.skew_mean",
    _over_zero(10.0): "reward.width",
    _over_zero(2e-4): "policy.bandit.fit_tolerance",
    _over_zero(0.02): "objective.tau",
    _over_zero(0.1): "objective.beta",
    _over_zero(1e-3): "learner.lr",
    _over_zero(120.0): "limits.wait_seconds limits.placement_seconds",
    _over_zero(240.0): "limits.mirror_seconds",
    _over_zero(60.0): "limits.queue_seconds limits.transfer_seconds",
    _over_zero(1e-5): "limits.engine_mismatch_kl",
    _over_zero(300.0): "limits.startup_seconds",
    _over_zero(512.0): "checkpoint.journal_mib",
    _over_zero(600.0): "limits.step_seconds limits.lease_seconds",
    _over_zero(900.0): "limits.stall_seconds",
    Bound(0, 1, open_low=True, open_high=True, inside=0.2): "objective.epsilon",
    Bound(0, 1, open_low=True, inside=0.5): "limits.failure_rate",
    Bound(0, 1): "length_data.skewed length_data.wide objective.value.gamma objective.value.lam",
    Bound(2, 100): "length_data.longest",
    Bound(1, 6144): "length_data.prompts",
    Bound(16): "length_data.context",
    Bound(0, 1, open_low=True, inside=0.9): "rollout.vllm.gpu_memory_utilization",
    Bound(1, open_low=True, inside=2.0): "objective.mask_ratio",
    Bound(high=0): "objective.floor",
    Bound(0, 2**63 - 1): "seed",
    Bound(0, 65_535): "reward.port",
    Bound(0, 3): "learner.zero_stage",
}
_OF_A_STAGE: dict[Bound, str] = {
    _ONE_UP: "epochs minibatch lora.alpha",
    _ZERO_UP: "micro_batch warmup weight_decay max_grad_norm max_tokens eval_every lora.rank",
    _FRACTION: "held_out lora.dropout",
    _over_zero(1e-5): "lr",
}
BOUNDS: dict[str, Bound] = {key: bound for bound, keys in _GROUPS.items() for key in keys.split()}
for _stage in ("sft", "reward_model"):
    BOUNDS |= {f"{_stage}.{k}": bound for bound, ks in _OF_A_STAGE.items() for k in ks.split()}
BOUNDS |= {f"gold.{k[7:]}": bound for k, bound in BOUNDS.items() if k.startswith("reward.")}
UNBOUNDED = ("policy.bandit.location", "reward.centre", "gold.centre")


def numbers_are_in_range(config: Config) -> None:
    """Raise ConfigError for a number outside its `BOUNDS`, and for one that is not finite."""
    for key, value in leaves(config):
        bound = BOUNDS.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(key, value, "is not a finite number", f"set {key} to a number")
        if bound and isinstance(value, int | float) and not bound.holds(value):
            fix = f"set {key}={shown(bound.nearest(value))}"
            raise ConfigError(key, value, f"must be {bound}", fix)


def leaves(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Full dotted name and value of every setting."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def near(value: int, unit: int) -> list[int]:
    """The multiples of `unit` around `value`, the positive ones."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def set_to(key: str, values: Sequence[int]) -> str:
    """A fix: set the key to one of the values."""
    return f"set {key}={any_of(values)}"


def any_of(values: Sequence[object]) -> str:
    """`a, b or c`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last

"""Rules on the algorithm: rounds, groups, minibatches, passes, ages and the objective.

B, C, M, T, S as in `configs.schema`. Each rule raises ConfigError with a concrete fix, and may rely
on what the rules before it in `ALGORITHM_RULES` hold.
"""

import difflib

from configs.bounds import Rule, any_of, near, set_to
from configs.choices import Advantage, DataSource, Importance, Order, Proximal, Schedule
from configs.errors import ConfigError
from configs.objectives import OFFLINE, ON_POLICY, TABLE, Traits
from configs.schema import Config


def objective_is_known(config: Config) -> None:
    """`objective.name` is a row of Table 1."""
    name = config.objective.name
    if name not in TABLE:
        close = difflib.get_close_matches(name, TABLE, n=3) or list(TABLE)
        raise ConfigError("objective.name", name, "no such objective",
                          f"set objective.name={any_of(close)}")  # fmt: skip


def minibatch_holds_whole_groups(config: Config) -> None:
    """M is a multiple of C."""
    m, c = config.learner.minibatch, config.rollout.responses_per_prompt
    if m % c:
        problem = f"M must be a multiple of rollout.responses_per_prompt={c} (C)"
        raise ConfigError("learner.minibatch", m, problem, set_to("learner.minibatch", near(m, c)))


def round_holds_whole_groups(config: Config) -> None:
    """B is a multiple of C."""
    b, c = config.replay.samples_per_round, config.rollout.responses_per_prompt
    if b % c:
        key, problem = "replay.samples_per_round", "B must be a multiple of C"
        raise ConfigError(key, b, f"{problem}, rollout.responses_per_prompt={c}",
                          set_to(key, near(b, c)))  # fmt: skip


def round_holds_whole_minibatches(config: Config) -> None:
    """B is a multiple of M."""
    b, m = config.replay.samples_per_round, config.learner.minibatch
    c = config.rollout.responses_per_prompt
    if b % m:
        top = min(b, m) // c * c
        near_top = range(top, max(0, top - 10_000 * c), -c)  # further down is no help, and slow
        fitting = [size for size in near_top if b % size == 0][:2]
        fix = set_to("learner.minibatch", fitting or [b])
        problem = f"B must be a multiple of learner.minibatch={m} (M)"
        fix += f", or replay.samples_per_round={any_of(near(b, m))}"
        raise ConfigError("replay.samples_per_round", b, problem, fix)


def group_wise_objective_has_groups(config: Config) -> None:
    """C ≥ 2 where an objective compares members of a group."""
    c, name = config.rollout.responses_per_prompt, config.objective.name
    if c < 2 and _traits(config).group_wise:
        pointwise = [n for n, traits in TABLE.items() if not traits.group_wise]
        problem = f"{name} compares responses to the same prompt and needs C ≥ 2"
        fix = f"set rollout.responses_per_prompt=2, or objective.name={any_of(pointwise)}"
        raise ConfigError("rollout.responses_per_prompt", c, problem, fix)


def leave_one_out_has_others(config: Config) -> None:
    """C ≥ 2 for the leave-one-out advantage of PPO and REINFORCE."""
    c = config.rollout.responses_per_prompt
    uses_advantage = config.objective.name in {"ppo", "reinforce"}
    if c < 2 and uses_advantage and config.objective.advantage is Advantage.leave_one_out:
        problem = "needs other responses to the same prompt, and C=1"
        fix = "set objective.advantage=standardised or rollout.responses_per_prompt=2"
        raise ConfigError("objective.advantage", config.objective.advantage, problem, fix)


def proximal_policy_is_clipped_against(config: Config) -> None:
    """`objective.proximal=first_use` is for PPO, which has a ratio to clip."""
    name, proximal = config.objective.name, config.objective.proximal
    if proximal is not Proximal.behaviour and name != "ppo":
        fix = "set objective.proximal=behaviour, or objective.name=ppo"
        raise ConfigError("objective.proximal", proximal, f"{name} clips no ratio", fix)


def importance_weight_is_read(config: Config) -> None:
    """`objective.importance` is for REINFORCE, and a cap for where there is a weight."""
    s = config.objective
    weighted = s.name == "reinforce" and s.importance is not Importance.none
    if s.importance is not Importance.none and not weighted:
        problem = "ppo's weight is its ratio" if s.name == "ppo" else f"{s.name} has no such weight"
        fix = "set objective.importance=none, or objective.name=reinforce"
        raise ConfigError("objective.importance", s.importance, problem, fix)
    decoupled = s.proximal is Proximal.first_use
    if s.importance_cap is not None and not (weighted or decoupled):
        fix = "set objective.importance_cap=null, or "
        fix += {
            "ppo": "objective.proximal=first_use",
            "reinforce": "objective.importance=token or sequence",
        }.get(s.name, "objective.name=ppo objective.proximal=first_use")
        raise ConfigError("objective.importance_cap", s.importance_cap, "caps no weight", fix)


def mask_ratio_is_read(config: Config) -> None:
    """`objective.mask_ratio` is for PPO and REINFORCE."""
    name, ratio = config.objective.name, config.objective.mask_ratio
    if ratio is not None and name not in {"ppo", "reinforce"}:
        fix = "set objective.mask_ratio=null, or objective.name=ppo or reinforce"
        raise ConfigError("objective.mask_ratio", ratio, f"{name} masks no sequences", fix)


def every_rank_has_a_group(config: Config) -> None:
    """M/C ≥ ranks: each rank has at least one group of a minibatch."""
    ranks, groups = config.learner.ranks, config.groups_per_step
    if groups < ranks:
        problem = f"a minibatch has only M/C={groups} groups, fewer than ranks"
        m = ranks * config.rollout.responses_per_prompt
        fix = f"set learner.ranks={groups} or learner.minibatch={m}"
        raise ConfigError("learner.ranks", ranks, problem, fix)


def micro_batch_fits(config: Config) -> None:
    """A micro-batch is at most M, and holds whole groups for pairwise objectives."""
    micro, m = config.learner.micro_batch, config.learner.minibatch
    c = config.rollout.responses_per_prompt
    key = "learner.micro_batch"
    if micro > m:
        raise ConfigError(key, micro, f"is over learner.minibatch={m} (M)", f"set {key}={m}")
    if _traits(config).pairwise and micro % c:
        sizes = [size for size in near(micro, c) if size <= m]
        problem = f"{config.objective.name} compares a group's responses: must be a multiple of C"
        raise ConfigError(key, micro, f"{problem}={c}", set_to(key, sizes))


def packing_keeps_no_distributions(config: Config) -> None:
    """Exact KL needs distributions laid out by rollout, which packed rows do not have."""
    if config.learner.packing and config.learner.exact_kl:
        fix = "set learner.packing=false or learner.exact_kl=false"
        raise ConfigError("learner.packing", True, "keeps no distributions for exact KL", fix)


def source_fits_objective(config: Config) -> None:
    """The objective may learn from `data.source` (Table 1)."""
    name, source = config.objective.name, config.data.source.name
    if source not in _traits(config).sources:
        other = OFFLINE if source == ON_POLICY else ON_POLICY
        fitting = [n for n, traits in TABLE.items() if source in traits.sources]
        problem = f"{name} learns from {other.replace('_', '-')} data only"
        fix = f"set data.source={other}, or objective.name={any_of(fitting)}"
        raise ConfigError("data.source", source, problem, fix)


def reuse_fits_objective(config: Config) -> None:
    """T = 1 where reuse is unsound (Table 1: REINFORCE)."""
    t, name = config.replay.inner_epochs, config.objective.name
    if t > 1 and not _traits(config).reuse:
        problem = f"{name} is sound on fresh samples only (T=1)"
        fix = "set replay.inner_epochs=1, or objective.name=ppo to reuse samples"
        raise ConfigError("replay.inner_epochs", t, problem, fix)


def quantiles_rise(config: Config) -> None:
    """ReST's quantile goes up."""
    start, end = config.objective.quantile_start, config.objective.quantile_end
    if start > end:
        problem = f"is over objective.quantile_end={end}, and ReST raises its quantile"
        fix = f"set objective.quantile_start={end} or lower"
        raise ConfigError("objective.quantile_start", start, problem, fix)


def warmup_ends(config: Config) -> None:
    """The warm-up is no longer than the run."""
    warmup, updates = config.learner.warmup, config.learner.updates
    if warmup > updates:
        problem = f"lasts longer than learner.updates={updates}"
        raise ConfigError("learner.warmup", warmup, problem, f"set learner.warmup={updates // 10}")


def offline_rollouts_have_no_age(config: Config) -> None:
    """No schedule, lag or budget is set for data that nobody generates."""
    if config.data.source is not DataSource.offline:
        return
    replay = config.replay
    problem = "offline rollouts are not generated"
    if replay.schedule is not Schedule.lockstep:
        raise ConfigError("replay.schedule", replay.schedule, f"{problem}: nothing to pipeline",
                          "set replay.schedule=lockstep or data.source=on_policy")  # fmt: skip
    if replay.lag:
        raise ConfigError("replay.lag", replay.lag, f"{problem}: no weights to delay",
                          "set replay.lag=0 or data.source=on_policy")  # fmt: skip
    if replay.max_age is not None:
        raise ConfigError("replay.max_age", replay.max_age, f"{problem}: they have no age",
                          "set replay.max_age=null or data.source=on_policy")  # fmt: skip


def budget_can_be_kept(config: Config) -> None:
    """Law 6: the last pass over a round happens lag + S − 1 steps after its generation."""
    max_age, least = config.replay.max_age, config.replay.lag + config.steps_per_round - 1
    if max_age is not None and max_age < least and config.data.source is DataSource.on_policy:
        problem = f"a round's last step is at age lag + T·B/M − 1 = {least}"
        fix = f"set replay.max_age={least} or more, or lower replay.inner_epochs"
        raise ConfigError("replay.max_age", max_age, problem, fix)


def ready_order_is_pipelined(config: Config) -> None:
    """`replay.order=ready` needs rounds that overlap."""
    replay = config.replay
    if replay.order is Order.ready and replay.schedule is not Schedule.pipelined:
        fix = "set replay.schedule=pipelined or replay.order=issue"
        raise ConfigError("replay.order", replay.order, "lockstep has nothing to overtake", fix)


def _traits(config: Config) -> Traits:
    return TABLE[config.objective.name]


ALGORITHM_RULES: tuple[Rule, ...] = (
    objective_is_known,
    minibatch_holds_whole_groups,
    round_holds_whole_groups,
    round_holds_whole_minibatches,
    group_wise_objective_has_groups,
    leave_one_out_has_others,
    proximal_policy_is_clipped_against,
    importance_weight_is_read,
    mask_ratio_is_read,
    every_rank_has_a_group,
    micro_batch_fits,
    packing_keeps_no_distributions,
    source_fits_objective,
    reuse_fits_objective,
    quantiles_rise,
    warmup_ends,
    offline_rollouts_have_no_age,
    budget_can_be_kept,
    ready_order_is_pipelined,
)

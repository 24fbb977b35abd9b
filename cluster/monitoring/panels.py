"""The panels of the Grafana dashboard: titles, queries, and what they say.

Queries are for one run or several (`$run`), and drop the labels that Ray adds, so that a part that
was restarted goes on in the same line.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """A title, and queries by what their lines are called. by: the label of a heat map's rows."""

    title: str
    queries: dict[str, str]
    meaning: str
    unit: str = "short"
    log: bool = False
    stacked: bool = False
    by: str = ""
    fixed: dict[str, float] = field(default_factory=dict)  # ends of the axis


def gauge(name: str, *labels: str, only: str = "") -> str:
    """A gauge by run and labels."""
    return f"max by ({', '.join(('run', *labels))}) (ray_onpolicy_{name}{_chosen(only)})"


def total(name: str) -> str:
    """A counter."""
    return f"sum by (run) (ray_onpolicy_{name}{_chosen()})"


def rate(name: str, *labels: str, only: str = "") -> str:
    """A counter's increase per second."""
    by = ", ".join(("run", *labels))
    return f"sum by ({by}) (rate(ray_onpolicy_{name}{_chosen(only)}[$__rate_interval]))"


def rows(name: str, label: str) -> str:
    """A counter's increase per second, for a heat map with a row for each value of the label."""
    return f"sum by ({label}) (rate(ray_onpolicy_{name}{_chosen()}[$__rate_interval]))"


def quantile(q: float, name: str) -> str:
    """A histogram's quantile over all actors."""
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', 'le')})"


def _chosen(only: str = "") -> str:
    return "{" + ", ".join(filter(None, ('run=~"$run"', only))) + "}"


_RUN = "{{run}}"
_FRACTION = {"min": 0.0, "max": 1.0}

PANELS = (
    Panel(
        "KL to the generating policy, per token",
        {
            f"{_RUN} KL(π_θ‖π_gen)": gauge("kl_to_generator"),
            f"{_RUN} KL(π_gen‖π_θ)": gauge("kl_from_generator"),
            f"{_RUN} floor: engine and learner at age 0": gauge("engine_mismatch_kl"),
            f"{_RUN} floor: engine and learner on the probe": gauge("engine_mismatch_probe"),
        },
        "nats per token. The floor is numerical error; when it rises to the KL, weights did not "
        "arrive.",
        log=True,
    ),
    Panel(
        "Age of what was consumed",
        {"{{age}}": rows("cell_rollouts_total", "age")},
        "Rollouts per second by age in optimizer steps; a row begins at its number.",
        by="age",
    ),
    Panel(
        "Reuse of what was consumed",
        {"{{reuse}}": rows("cell_rollouts_total", "reuse")},
        "Rollouts per second by how often they have been consumed; a row begins at its number.",
        by="reuse",
    ),
    Panel(
        "KL to the generating policy by age",
        {"{{age}}": 'max by (age) (ray_onpolicy_cell_kl_to_generator{run=~"$run"})'},
        "nats per token, the largest of the cells of an age.",
        by="age",
    ),
    Panel(
        "Share of the gradient by age",
        {"{{age}}": 'sum by (age) (ray_onpolicy_cell_gradient_share{run=~"$run"})'},
        "Σ|∂loss/∂log π| of the cells of an age over the whole; several runs add up.",
        by="age",
    ),
    Panel(
        "Effective sample size",
        {
            _RUN: gauge("ess"),
            f"{_RUN} worst cell": 'min by (run) (ray_onpolicy_cell_ess{run=~"$run"})',
        },
        "(Σρ)²/(n·Σρ²), of the samples used.",
        unit="percentunit",
        fixed=_FRACTION,
    ),
    Panel(
        "Clip fraction",
        {_RUN: gauge("clip_fraction"), f"{_RUN} worst cell": gauge("cell_clip_fraction")},
        "Ratios outside [1−ε, 1+ε]; PPO only.",
        unit="percentunit",
        fixed=_FRACTION,
    ),
    Panel(
        "Reward",
        {
            f"{_RUN} proxy, evaluation": gauge("reward_eval"),
            f"{_RUN} gold, evaluation": gauge("reward_gold"),
            f"{_RUN} training samples": gauge("reward_mean"),
        },
        "The proxy goes up while gold falls: over-optimisation.",
    ),
    Panel(
        "KL to π_ref, per token",
        {_RUN: gauge("kl_to_reference")},
        "KL(π_θ‖π_ref) in nats per token.",
    ),
    Panel(
        "Queue against the budget",
        {
            f"{_RUN} queued": gauge("queue_depth"),
            f"{_RUN} queued or in flight": f"{gauge('queue_depth')} + "
            f"{gauge('rollouts_in_flight')}",
            f"{_RUN} budget": gauge("queue_budget"),
        },
        "Rollouts; the budget is the most that max_age lets be there at once.",
    ),
    Panel("Rollouts in flight", {_RUN: gauge("rollouts_in_flight")}, "Leased to actors."),
    Panel(
        "Retired, by reason",
        {f"{_RUN} {{{{reason}}}}": rate("retired_total", "reason")},
        "Rollouts per second; exhausted is the good end.",
        stacked=True,
    ),
    Panel(
        "Restarts and skipped steps",
        {
            f"{_RUN} rollout actors": total("actor_restarts_total"),
            f"{_RUN} lineage": gauge("lineage"),
            f"{_RUN} skipped steps": total("skipped_total"),
        },
        "So far. The lineage goes up by one with every restart of the learner.",
    ),
    Panel(
        "Reward latency",
        {
            f"{_RUN} median": quantile(0.5, "reward_latency_seconds"),
            f"{_RUN} 95%": quantile(0.95, "reward_latency_seconds"),
        },
        "Of a lease's rewards, as its actor waits for them, retries included.",
        unit="s",
    ),
    Panel(
        "Reward errors",
        {_RUN: rate("retired_total", only='reason="reward_failed"')},
        "Rollouts per second whose reward failed after all attempts.",
    ),
    Panel(
        "Weight sync",
        {
            f"{_RUN} publishing": gauge("weight_sync_seconds"),
            f"{_RUN} whole step": gauge("step_seconds"),
        },
        "Seconds of a step, and of them for reading out and publishing weights.",
        unit="s",
    ),
    Panel("Tokens", {_RUN: gauge("tokens_per_second")}, "Response tokens consumed per second."),
    Panel(
        "Idle",
        {
            f"{_RUN} learner": gauge("learner_idle_fraction"),
            f"{_RUN} actors": gauge("actor_idle_fraction"),
        },
        "Waiting for a batch; waiting for a lease, since the run began.",
        unit="percentunit",
        fixed=_FRACTION,
    ),
    Panel(
        "Silence, by stage",
        {f"{_RUN} {{{{stage}}}}": f"time() - {gauge('stage_heard_timestamp_seconds', 'stage')}"},
        "Seconds since the learner, the slowest rollout actor, anything in the queue, and the "
        "driver were last heard of.",
        unit="s",
    ),
    Panel("Optimizer steps", {_RUN: gauge("step")}, "In the weights."),
    Panel(
        "Responses",
        {
            f"{_RUN} tokens": gauge("response_length"),
            f"{_RUN} seconds in the queue": gauge("queue_seconds"),
        },
        "Mean length, and mean time from entering the queue to the first use.",
    ),
)

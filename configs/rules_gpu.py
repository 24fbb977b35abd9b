"""Rules on GPUs and nodes: who has one, how weights travel between them, and who shares.

Each rule raises ConfigError with a concrete fix, and may rely on what the rules before it hold.
"""

import re

from configs.bounds import Rule
from configs.choices import DataSource, EngineKind, Schedule, Spread, UpdateKind
from configs.errors import ConfigError
from configs.schema import Config
from configs.schema_vllm import Transfer

BY_HOST = "rollout.transfer=host"
_LABEL = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*=[A-Za-z0-9._-]+")


def transfer_has_gpus(config: Config) -> None:
    """nccl and ipc go from a learner on a GPU to vLLM on a GPU; nccl wants whole ones, its own."""
    transfer, cluster, key = config.rollout.transfer, config.cluster, "rollout.transfer"
    if transfer is Transfer.host:
        return
    if config.rollout.engine is not EngineKind.vllm:
        fix = f"set rollout.engine=vllm or {BY_HOST}"
        raise ConfigError(key, transfer, "only vllm takes weights on a GPU", fix)
    if config.data.source is DataSource.offline:
        problem, fix = "offline rollouts need no weights", f"set {BY_HOST}"
        raise ConfigError(key, transfer, problem, fix)
    least = 1.0 if transfer is Transfer.nccl else 0.0
    if min(cluster.learner_gpus, cluster.actor_gpus) < least or not (
        cluster.learner_gpus and cluster.actor_gpus
    ):
        shares = (1, 1) if transfer is Transfer.nccl else (0.5, 0.4)
        problem = "goes from a GPU to a GPU, and there must be one on both sides"
        fix = f"set cluster.learner_gpus={shares[0]} cluster.actor_gpus={shares[1]}, or {BY_HOST}"
        raise ConfigError(key, transfer, problem, fix)


def pushed_weights_are_the_newest(config: Config) -> None:
    """nccl and ipc give actors each version as it is made: no lag, and none between requests."""
    transfer, replay = config.rollout.transfer, config.replay
    if transfer is Transfer.host:
        return
    if replay.lag:
        fix = f"set replay.lag=0 or {BY_HOST}"
        raise ConfigError(
            "replay.lag", replay.lag, f"{transfer.name} sends the newest weights", fix
        )
    if replay.schedule is Schedule.pipelined and config.rollout.update is not UpdateKind.in_flight:
        problem = f"{transfer.name} sends weights while pipelined actors generate"
        fix = f"set rollout.update=in_flight or {BY_HOST}"
        raise ConfigError("rollout.update", config.rollout.update, problem, fix)


def colocation_fits_transfer(config: Config) -> None:
    """ipc is within one GPU, nccl between GPUs."""
    transfer, colocated = config.rollout.transfer, config.cluster.colocated
    if transfer is Transfer.ipc and not colocated:
        fix = f"set cluster.colocated=true, or rollout.transfer=nccl or {BY_HOST}"
        raise ConfigError("rollout.transfer", transfer, "goes within one GPU that is shared", fix)
    if transfer is Transfer.nccl and colocated:
        problem = "nccl goes between GPUs, and colocated are on one"
        fix = f"set rollout.transfer=ipc or {BY_HOST}, or cluster.colocated=false"
        raise ConfigError("rollout.transfer", transfer, problem, fix)


def colocated_take_turns(config: Config) -> None:
    """cluster.colocated: one rank, one vLLM actor and lockstep, in shares of one GPU."""
    cluster, rollout, key = config.cluster, config.rollout, "cluster.colocated"
    if not cluster.colocated:
        return
    off = "or cluster.colocated=false"
    if rollout.engine is not EngineKind.vllm or config.data.source is DataSource.offline:
        fix = f"set rollout.engine=vllm data.source=on_policy, {off}"
        raise ConfigError(key, True, "only vllm gives its GPU memory back for a while", fix)
    if config.replay.schedule is not Schedule.lockstep:
        problem = "learner and actor take turns, and pipelined they work at once"
        raise ConfigError(key, True, problem, f"set replay.schedule=lockstep, {off}")
    if rollout.actors != 1 or config.learner.ranks != 1:
        problem = "one GPU has room for one actor and one rank"
        raise ConfigError(key, True, problem, f"set rollout.actors=1 learner.ranks=1, {off}")
    shares = cluster.learner_gpus + cluster.actor_gpus + cluster.evaluator_gpus
    if not (cluster.learner_gpus and cluster.actor_gpus) or shares > 1:
        problem = f"shares of one GPU, and they add up to {shares:g}"
        fix = "set cluster.learner_gpus=0.5 cluster.actor_gpus=0.4 cluster.evaluator_gpus=0.1"
        raise ConfigError(key, True, problem, f"{fix}, {off}")


def tensor_parallel_is_the_actors_gpus(config: Config) -> None:
    """An engine is spread over exactly the GPUs that its actor has."""
    parallel, gpus = config.rollout.vllm.tensor_parallel, config.cluster.actor_gpus
    key = "rollout.vllm.tensor_parallel"
    if config.rollout.engine is not EngineKind.vllm:
        if parallel != 1:
            fix = "set rollout.engine=vllm or rollout.vllm.tensor_parallel=1"
            raise ConfigError(key, parallel, "only vllm spreads over GPUs", fix)
        return
    if parallel != max(1.0, gpus):
        whole = max(1, round(gpus))
        problem = f"an engine takes all of its actor's GPUs, cluster.actor_gpus={gpus:g}"
        fix = f"set {key}={whole}" if whole == max(1.0, gpus) else f"set cluster.actor_gpus={whole}"
        raise ConfigError(key, parallel, problem, f"{fix}, or cluster.actor_gpus={parallel}")


def placed_parts_reserve_something(config: Config) -> None:
    """A part is placed by what it reserves: nodes are named for those with CPUs or GPUs only."""
    cluster, nodes = config.cluster, config.cluster.nodes
    for part in ("learner", "actors", "evaluator", "reward"):
        label, key, name = getattr(nodes, part), f"cluster.nodes.{part}", part.removesuffix("s")
        reserved = getattr(cluster, f"{name}_cpus") + getattr(cluster, f"{name}_gpus")
        if label and not _LABEL.fullmatch(label):
            raise ConfigError(key, label, "is not a node label", f"write {key}=role={part}")
        if label and not reserved:
            fix = f"set cluster.{name}_cpus=1, or {key}= for any node"
            raise ConfigError(key, label, "names nodes for a part that reserves nothing", fix)
    if nodes.ranks is not Spread.pack and not cluster.learner_cpus + cluster.learner_gpus:
        key, problem = "cluster.nodes.ranks", "places ranks that reserve nothing"
        raise ConfigError(key, nodes.ranks, problem, f"set cluster.learner_cpus=1, or {key}=pack")


def colocated_parts_name_one_node(config: Config) -> None:
    """What shares one GPU has no nodes of its own."""
    nodes = config.cluster.nodes
    for part in ("actors", "evaluator"):
        label, key = getattr(nodes, part), f"cluster.nodes.{part}"
        if config.cluster.colocated and label not in ("", nodes.learner):
            problem = "cluster.colocated=true puts it where the learner is"
            raise ConfigError(key, label, problem, f"set {key}={nodes.learner}")


GPU_RULES: tuple[Rule, ...] = (
    transfer_has_gpus,
    pushed_weights_are_the_newest,
    colocation_fits_transfer,
    colocated_take_turns,
    tensor_parallel_is_the_actors_gpus,
    placed_parts_reserve_something,
    colocated_parts_name_one_node,
)

"""Every setting of a run, typed, with its unit, its default and the invariant it takes part in.

The letters B, C, M, T are those of the paper's Algorithm 1 (arXiv 2404.14367); S = T·B/M is the
number of optimizer steps that one round feeds.
"""

from dataclasses import dataclass, field

from configs.choices import (
    Advantage,
    DataFormat,
    DataSource,
    EngineKind,
    Importance,
    Order,
    OverLength,
    Pairs,
    Precision,
    PromptKind,
    Proximal,
    RateSchedule,
    Ratio,
    Resume,
    RewardScale,
    Schedule,
    UpdateKind,
)
from configs.schema_length import LengthDataConfig
from configs.schema_lora import LoraConfig
from configs.schema_nodes import NodesConfig
from configs.schema_reward import RewardConfig, no_reward
from configs.schema_stages import PipelineConfig, StageConfig
from configs.schema_value import ValueConfig
from configs.schema_vllm import Transfer, VllmConfig


@dataclass
class RunConfig:
    """Where a run writes. Without a name it takes the preset's and the next free number."""

    name: str = ""
    dir: str = "runs"
    mirror: str = ""  # also kept there, a URL of fsspec's: s3://bucket/runs, gs://bucket/runs
    samples_per_round: int = 3  # rollouts kept per round in samples.jsonl, for people to read
    trackers: list[str] = field(default_factory=list)  # of `TRACKERS`, also given metrics


@dataclass
class BanditPolicyConfig:
    """The bandit's π_ref (Appendix I): a GPT-2 fitted to a histogram of clipped Cauchy draws."""

    vocabulary: int = 100
    layers: int = 3
    heads: int = 3
    width: int = 48
    location: float = -0.7
    scale: float = 0.4
    draws: int = 10_000
    seed: int = 0  # one draw of π_ref is shared by all seeds of a study
    fit_tolerance: float = 2e-4  # nats: KL(histogram ‖ network) at the worst of fresh prefixes


@dataclass
class PolicyConfig:
    """The policy's starting weights, which are also π_ref: a model directory, or the bandit's."""

    path: str = ""  # a directory or hub name for transformers; empty: the bandit's network
    revision: str = ""
    cache_dir: str = ""  # where the fitted bandit network is kept; empty: ~/.cache/onpolicy
    bandit: BanditPolicyConfig = field(default_factory=BanditPolicyConfig)


@dataclass
class PromptsConfig:
    source: PromptKind = PromptKind.bandit
    path: str = ""  # file, or a datasets path or name
    format: DataFormat = DataFormat.auto  # by the columns of each row
    column: str = "prompt"  # text column; a column `prompt_ids` of token ids is read as it is
    subset: str = ""  # of a data set that has several, as `alpaca_instructions`
    split: str = "train"
    count: int = 10  # bandit: number of contexts; files: at most so many rows, 0 for all
    max_tokens: int = 0  # the longest prompt allowed; 0: what the policy's context leaves
    over_length: OverLength = OverLength.refuse  # cut keeps the end of a prompt
    shuffle: bool = False  # by keyed draw, anew in each epoch; streamed: within each buffer
    streaming: bool = False  # for sets larger than memory: read on as positions are asked for
    buffer: int = 10_000  # prompts kept in memory of a streamed set, twice


@dataclass
class RolloutConfig:
    engine: EngineKind = EngineKind.torch
    actors: int = 1
    responses_per_prompt: int = 10  # C
    temperature: float = 1.0
    max_tokens: int = 10
    lease: int = 10  # prompts per lease, at most B/C; its size never depends on `actors`
    update: UpdateKind = UpdateKind.between_requests
    concurrent_leases: int = 2  # that an actor serves at once with update=in_flight
    transfer: Transfer = Transfer.host  # the way that weights take to the actors
    adapter_only: bool = False  # of learner.lora: who receives it adds it to π_ref's weights
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass
class ReplayConfig:
    """The replay queue. With lockstep rounds the ages seen are exactly 0 … S − 1, plus lag."""

    samples_per_round: int = 100  # B, rollouts
    inner_epochs: int = 10  # T, the most times a rollout is consumed
    schedule: Schedule = Schedule.lockstep
    max_age: int | None = None  # steps; None: the tightest that the schedule can keep
    lag: int = 0  # steps by which actors get weights late
    order: Order = Order.issue
    shuffle: bool = False  # order of groups within a pass, by keyed draw


@dataclass
class ObjectiveConfig:
    """The loss, by its name in `configs.objectives.TABLE`, and the paper's knobs of it."""

    name: str = "ipo"
    tau: float = 0.02  # ipo: target margin is 1/(2τ)
    beta: float = 0.1  # rwr: temperature; dpo: KL weight; best_of_n_negative: weight of the others
    epsilon: float = 0.2  # ppo: clip range
    ratio: Ratio = Ratio.sequence  # ppo
    proximal: Proximal = Proximal.behaviour  # ppo: clip against π_gen, or π_θ at the first pass
    importance: Importance = Importance.none  # reinforce: weight by π_θ/π_gen; ppo's is its ratio
    importance_cap: float | None = None  # most of that weight, and of first_use's; None: no cap
    mask_ratio: float | None = None  # ppo, reinforce: a sequence further off π_gen counts 0
    advantage: Advantage = Advantage.standardised  # ppo, reinforce; gae has a value head
    value: ValueConfig = field(default_factory=ValueConfig)  # advantage=gae
    kl_reward: float = 0.0  # advantage=gae: β of −β·log π_gen/π_ref per token, where it starts …
    kl_target: float | None = None  # … nats per response that adapts β; None: β stays
    kl_horizon: float = 10_000  # fresh rollouts over which it adapts
    kl_loss: float = 0.0  # weight of KL(π_θ‖π_ref), nats per token, in the loss
    reward: RewardScale = RewardScale.raw  # rwr
    floor: float = -8.0  # best_of_n_negative: nats per token under which a response is left alone
    quantile_start: float = 0.5  # rest: samples over this quantile of the round's rewards …
    quantile_end: float = 0.9  # … raised linearly to this one by the last update


@dataclass
class DataConfig:
    """Where responses come from. Offline without a path: sampled once from π_ref and labelled."""

    source: DataSource = DataSource.on_policy
    path: str = ""  # file or data set of prompts with scored, ranked or labelled responses
    format: DataFormat = DataFormat.auto  # by the columns of each row
    subset: str = ""  # of a data set that has several, as `alpaca_human_preference`
    split: str = "train"
    over_length: OverLength = OverLength.refuse  # cut keeps the beginning of a response
    streaming: bool = False  # for sets larger than memory: read on as rows are asked for
    buffer: int = 10_000  # rows kept in memory of a streamed set, twice
    prompts: int = 100  # offline without a path, and label: groups of C sampled from π_ref
    pairs: Pairs = Pairs.disjoint  # label: which two of a group's responses make a pair


@dataclass
class LearnerConfig:
    minibatch: int = 100  # M, rollouts per optimizer step over all ranks
    micro_batch: int = 0  # rollouts per forward on one rank; 0: a rank's whole share
    micro_tokens: int = 0  # and tokens, padding included, with similar lengths together; 0: any
    packing: bool = False  # several sequences in a row of the forward
    gradient_checkpointing: bool = False  # activations again in the backward: less memory, slower
    updates: int = 1000  # minibatches consumed; a skipped step uses one up
    lr: float = 1e-3
    schedule: RateSchedule = RateSchedule.constant
    warmup: int = 0  # steps
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # 0: no clipping
    ranks: int = 1
    zero_stage: int = 0
    precision: Precision = Precision.float32
    lora: LoraConfig = field(default_factory=LoraConfig)
    exact_kl: bool | None = (
        None  # exact conditionals; None: when small enough to keep, and not packing
    )


@dataclass
class EvalConfig:
    every: int = 20  # updates; 0: only before the first and after the last
    samples: int = 100  # fresh rollouts of the current weights


@dataclass
class CheckpointConfig:
    """When a run can be gone on with. With neither `every` nor `seconds` there is no journal, and
    what dies is not brought back."""

    every: int = 0  # updates; 0: not by their number
    seconds: float = 60.0  # 0: not by time
    keep: int = 2  # the newest ones
    journal_mib: float = 512.0  # of rollouts since the last one, before the next is made


@dataclass
class LimitsConfig:
    """No wait without a limit, no failure without a count."""

    wait_seconds: float = 120.0  # for an answer
    mirror_seconds: float = 240.0  # for the last copy to run.mirror
    startup_seconds: float = 300.0
    placement_seconds: float = 120.0  # for the cluster to have room, nodes being added included
    queue_seconds: float = 60.0  # for the queue to say how it is, before it is taken to hang
    lease_seconds: float = 600.0  # for a lease, before its actor is taken to hang
    step_seconds: float = 600.0  # for one batch, before the learner is taken to hang
    transfer_seconds: float = 60.0  # for weights pushed by nccl or ipc, before they go by host
    stall_seconds: float = 900.0  # without any progress, before the run stops and says so
    backoff_seconds: float = 0.5  # before a restart; twice as long each time, at most 30 s
    failure_rate: float = 0.5  # of the last `failure_window` rollouts; above it the run stops
    failure_window: int = 200
    actor_restarts: int = 5  # of all rollout actors together
    learner_restarts: int = 3
    queue_restarts: int = 5
    evaluator_restarts: int = 3
    prompt_attempts: int = 3  # deaths of actors on one prompt, before it is quarantined
    engine_mismatch_kl: float | None = None  # nats/token, above it the run warns; None: by dtype
    skipped_steps: int = 3  # in a row, not finite, that stop the run


@dataclass
class ClusterConfig:
    address: str = ""  # Ray address; empty: RAY_ADDRESS, else a cluster of our own on this machine
    dashboard: bool = False  # Ray's dashboard, when we start the cluster
    actor_cpus: float = 0.0  # CPUs that Ray reserves for each rollout actor
    learner_cpus: float = 0.0
    evaluator_cpus: float = 0.0
    reward_cpus: float = 0.0  # for each of reward.replicas
    learner_gpus: float = 0.0
    actor_gpus: float = 0.0
    evaluator_gpus: float = 0.0
    reward_gpus: float = 0.0  # for each of reward.replicas
    gpu_gib: float = 80.0  # GiB of memory that a GPU has, for `train --dry-run`
    nodes: NodesConfig = field(default_factory=NodesConfig)  # of what has CPUs or GPUs reserved
    colocated: bool = False  # learner and actor share one GPU and take turns: vLLM sleeps meanwhile
    threads: int = 1  # per process; small models are slower with two. π_ref may have one more
    metrics_seconds: float = 10.0  # between exports to Ray's metrics agent, at least 1; 0: none
    faults: str = ""  # faults on purpose, `configs.faults`; for tests of reliability


@dataclass
class Config:
    """The whole tree. `seed` keys every random draw of the run.

    resume: what to do with an unfinished run of this `run.name`: go on from its last checkpoint
    (auto), also where settings differ (changed), or start anew (never).
    """

    seed: int = 0
    resume: Resume = Resume.auto
    run: RunConfig = field(default_factory=RunConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    gold: RewardConfig = field(default_factory=no_reward)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    length_data: LengthDataConfig = field(default_factory=LengthDataConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sft: StageConfig = field(default_factory=StageConfig)
    reward_model: StageConfig = field(default_factory=StageConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def steps_per_round(self) -> int:
        """S = T·B/M, the optimizer steps that one round feeds."""
        return self.replay.inner_epochs * self.replay.samples_per_round // self.learner.minibatch

    @property
    def groups_per_round(self) -> int:
        """B/C."""
        return self.replay.samples_per_round // self.rollout.responses_per_prompt

    @property
    def groups_per_step(self) -> int:
        """M/C."""
        return self.learner.minibatch // self.rollout.responses_per_prompt

    @property
    def checkpoints(self) -> bool:
        """Whether the run keeps a journal and checkpoints."""
        return bool(self.checkpoint.every or self.checkpoint.seconds)

    @property
    def rounds(self) -> int:
        """Rounds that `learner.updates` minibatches take, the last one perhaps not to its end."""
        return -(-self.learner.updates // self.steps_per_round)

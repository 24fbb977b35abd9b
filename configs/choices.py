"""The words that settings can take."""

from enum import Enum


class EngineKind(Enum):
    torch = "torch"
    vllm = "vllm"


class UpdateKind(Enum):
    between_requests = "between_requests"
    in_flight = "in_flight"


class Schedule(Enum):
    lockstep = "lockstep"
    pipelined = "pipelined"


class Order(Enum):
    issue = "issue"
    ready = "ready"


class PromptKind(Enum):
    bandit = "bandit"
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"


class DataFormat(Enum):
    """The columns of a data set's rows, `actors.adapters`."""

    auto = "auto"
    text = "text"
    alpaca = "alpaca"
    relabelled = "relabelled"
    chat = "chat"


class OverLength(Enum):
    """What becomes of a row over a length limit."""

    refuse = "refuse"
    drop = "drop"
    cut = "cut"


class Pairs(Enum):
    """Which two of a group's responses `label` compares."""

    disjoint = "disjoint"
    all = "all"


class RewardKind(Enum):
    peak = "peak"
    length = "length"
    function = "function"
    model = "model"
    none = "none"


class DataSource(Enum):
    on_policy = "on_policy"
    offline = "offline"


class Ratio(Enum):
    sequence = "sequence"
    token = "token"


class Proximal(Enum):
    behaviour = "behaviour"
    first_use = "first_use"


class Importance(Enum):
    none = "none"
    token = "token"
    sequence = "sequence"


class Advantage(Enum):
    standardised = "standardised"
    leave_one_out = "leave_one_out"
    gae = "gae"


class RewardScale(Enum):
    raw = "raw"
    standardised = "standardised"


class RateSchedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


TRACKERS = ("tensorboard", "trackio", "wandb")  # run.trackers; each a package of that name


class Resume(Enum):
    auto = "auto"
    changed = "changed"
    never = "never"


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Spread(Enum):
    """Which nodes several processes take: few, one, many, or each another (Ray's strategies)."""

    pack = "PACK"
    strict_pack = "STRICT_PACK"
    spread = "SPREAD"
    strict_spread = "STRICT_SPREAD"

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


class RewardScale(Enum):
    raw = "raw"
    standardised = "standardised"


class RateSchedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Resume(Enum):
    auto = "auto"
    changed = "changed"
    never = "never"


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"

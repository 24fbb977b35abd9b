"""Settings of what scores responses: `reward`, which is trained on, and `gold`."""

from dataclasses import dataclass, field

from configs.choices import Precision, RewardKind


@dataclass
class RewardConfig:
    """One reward. As `reward` it is served to actors and evaluator; as `gold` the evaluator alone
    scores with it, beside the reward, and nothing is trained on it."""

    kind: RewardKind = RewardKind.peak
    centre: float = 70.0  # peak: R1 has 70, R2 has 20
    width: float = 10.0
    target: float = 0.0  # length: tokens; the reward is −|length − target|/scale
    scale: float = 1.0
    end_tokens: list[int] = field(default_factory=list)  # length: the policy's; not counted
    path: str = ""  # function: `module:function`; model: a directory or hub name
    revision: str = ""  # model: commit on the hub, where `path` is a hub name
    precision: Precision = Precision.float32  # model
    batch_tokens: int = 16_384  # model: most tokens of one forward, padding included
    replicas: int = 1
    batch: int = 1024  # most responses scored in one call
    port: int = 0  # loopback port of the HTTP endpoint; 0 leaves HTTP off
    token_env: str = "ONPOLICY_REWARD_TOKEN"  # environment variable with the bearer token
    max_request_bytes: int = 1_000_000


def no_reward() -> RewardConfig:
    """What `gold` is unless it is set."""
    return RewardConfig(kind=RewardKind.none)

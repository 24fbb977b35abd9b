"""Rules on the value head and on the KL penalties."""

from configs.bounds import Rule
from configs.choices import Advantage, DataSource, Ratio
from configs.errors import ConfigError
from configs.schema import Config


def value_head_has_a_policy_gradient(config: Config) -> None:
    """`objective.advantage=gae` is for PPO and REINFORCE, and for advantages per token."""
    s = config.objective
    if s.advantage is not Advantage.gae:
        return
    if s.name not in {"ppo", "reinforce"}:
        fix = "set objective.advantage=standardised, or objective.name=ppo or reinforce"
        raise ConfigError("objective.advantage", s.advantage, f"{s.name} has no advantage", fix)
    if s.name == "ppo" and s.ratio is not Ratio.token:
        problem = "has an advantage per token, and objective.ratio=sequence one ratio per response"
        fix = "set objective.ratio=token, or objective.advantage=standardised"
        raise ConfigError("objective.advantage", s.advantage, problem, fix)


def kl_reward_has_a_value_head(config: Config) -> None:
    """A reward per token needs advantages per token; r̄ standardises rewards as they were given."""
    s = config.objective
    if s.kl_reward and s.advantage is not Advantage.gae:
        problem = "is a reward per token, which only objective.advantage=gae reads"
        fix = "set objective.kl_reward=0 (objective.kl_loss penalises any objective)"
        if s.name in {"ppo", "reinforce"}:
            fix += ", or objective.advantage=gae"
        raise ConfigError("objective.kl_reward", s.kl_reward, problem, fix)


def kl_target_steers_a_penalty(config: Config) -> None:
    """The controller multiplies β, which is to be over 0."""
    s = config.objective
    if s.kl_target is not None and not s.kl_reward:
        problem = "steers objective.kl_reward, which is 0 and would stay so"
        fix = "set objective.kl_target=null, or objective.kl_reward=0.2"
        raise ConfigError("objective.kl_target", s.kl_target, problem, fix)


def kl_loss_is_on_samples_of_the_policy(config: Config) -> None:
    """KL(π_θ‖π_ref) is estimated from samples with a known generator."""
    weight = config.objective.kl_loss
    if weight and config.data.source is DataSource.offline:
        problem = "estimates KL(π_θ‖π_ref) from the policy's own samples, not from offline data"
        fix = "set objective.kl_loss=0 or data.source=on_policy"
        raise ConfigError("objective.kl_loss", weight, problem, fix)


PENALTY_RULES: tuple[Rule, ...] = (
    value_head_has_a_policy_gradient,
    kl_reward_has_a_value_head,
    kl_target_steers_a_penalty,
    kl_loss_is_on_samples_of_the_policy,
)

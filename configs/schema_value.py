"""Settings of the value head that objective.advantage=gae trains in the learner."""

from dataclasses import dataclass


@dataclass
class ValueConfig:
    """V(prefix), a scalar head on the policy's last hidden state, and what is made of it.

    The defaults are those of TRL's former PPO trainer. The head stays in the learner: actors, the
    evaluator and exports have the policy alone.
    """

    coefficient: float = 0.1  # weight of the value loss
    epsilon: float = 0.2  # clip range of a value around the one at first use
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's λ: 1 is the return minus the value, 0 the one-step difference
    whiten: bool = True  # advantages to mean 0 and variance 1 over the minibatch's tokens
    detached: bool = False  # the value loss trains the head alone, not the policy beneath it

"""The paper's Table 1 as data: what each objective needs and allows.

The losses themselves live in `learner.objectives`; this table is what settings are checked
against before anything starts. Adding an objective is one file there and one line here.
"""

from dataclasses import dataclass

ON_POLICY = "on_policy"
OFFLINE = "offline"


@dataclass(frozen=True)
class Traits:
    """One row of Table 1 (arXiv 2404.14367), and what the row needs to be computed.

    loss: `module:function` of the pure loss.
    sources: data it may learn from, of `ON_POLICY`, `OFFLINE`.
    reuse: whether more than one pass (T > 1) over a sample is sound.
    negative_gradient: whether the loss can push a response's log-probability down.
    per: what the loss is averaged over: `rollout`, `pair`, `group`, `selected` or `good`.
    generator_logp, reference_logp: log-probability columns the loss reads.
    group_wise: whether it compares members of a group, so that C must be at least 2.
    """

    loss: str
    sources: tuple[str, ...]
    reuse: bool
    negative_gradient: bool
    per: str
    generator_logp: bool = False
    reference_logp: bool = False
    group_wise: bool = False

    @property
    def min_valid(self) -> int:
        """The fewest valid members with which a group is still usable."""
        return 2 if self.group_wise else 1

    @property
    def pairwise(self) -> bool:
        """Whether the loss couples two responses, so that a micro-batch must hold whole groups."""
        return self.per == "pair" or self.per == "group"

    @property
    def prefers(self) -> bool:
        """Whether it is a contrastive or a likelihood loss, and no policy gradient: then implicit
        rewards of a group's better and worse members are measured (Figures 9, 17, 18)."""
        return not self.loss.startswith(_PG)


_ON = (ON_POLICY,)
_OFF = (OFFLINE,)
_BOTH = (ON_POLICY, OFFLINE)
_PG = "learner.objectives.policy_gradient"
_WL = "learner.objectives.weighted_likelihood"
_CO = "learner.objectives.contrastive"

# fmt: off
TABLE: dict[str, Traits] = {
    "ppo": Traits(f"{_PG}:ppo", _ON, reuse=True, negative_gradient=True, per="rollout", generator_logp=True),
    "reinforce": Traits(f"{_PG}:reinforce", _ON, reuse=False, negative_gradient=True, per="rollout"),
    "rwr": Traits(f"{_WL}:rwr", _BOTH, reuse=True, negative_gradient=False, per="rollout"),
    "best_of_n": Traits(f"{_WL}:best_of_n", _BOTH, reuse=True, negative_gradient=False, per="group", group_wise=True),
    "best_of_n_negative": Traits(f"{_WL}:best_of_n_negative", _BOTH, reuse=True, negative_gradient=True, per="group", group_wise=True),
    "rest": Traits(f"{_WL}:rest", _BOTH, reuse=True, negative_gradient=False, per="selected"),
    "dpo": Traits(f"{_CO}:dpo", _BOTH, reuse=True, negative_gradient=True, per="pair", reference_logp=True, group_wise=True),
    "ipo": Traits(f"{_CO}:ipo", _BOTH, reuse=True, negative_gradient=True, per="pair", reference_logp=True, group_wise=True),
    "pref_ft": Traits(f"{_WL}:pref_ft", _OFF, reuse=True, negative_gradient=False, per="pair", group_wise=True),
    "binary_feedme": Traits(f"{_WL}:binary_feedme", _OFF, reuse=True, negative_gradient=False, per="good"),
}
# fmt: on

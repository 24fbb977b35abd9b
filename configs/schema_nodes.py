"""Settings of where on a Ray cluster the parts of a run go."""

from dataclasses import dataclass

from configs.choices import Spread


@dataclass
class NodesConfig:
    """Each a node label, `key=value`, as `ray start --labels role=learner` gives one, or of Ray's
    own, as `ray.io/accelerator-type=H100`. Empty: any node."""

    learner: str = ""
    actors: str = ""
    evaluator: str = ""
    reward: str = ""
    ranks: Spread = Spread.pack  # of the learner; strict_pack: all on one node

"""Settings of a low-rank adapter, trained instead of all weights."""

from dataclasses import dataclass


@dataclass
class LoraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank)·B·A, of which W stays as it was.

    B starts at 0, so that the policy starts at π_ref. A value head and a reward model's head train
    whole beside it.
    """

    rank: int = 0  # r, the columns of B; 0: no adapter, all weights train
    alpha: int = 16
    dropout: float = 0.0  # of the adapter's input, while training
    targets: str = ""  # linear layers by name, as q_proj,v_proj; empty: all but the output layer

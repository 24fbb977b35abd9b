"""Adapters to test with: a bandit that trains one, and networks that have one."""

import copy

import numpy as np
import torch

from actors import policy
from configs.schema_lora import LoraConfig
from learner import lora
from tests import varying

RANK = ("learner.lora.rank=8", "learner.lora.alpha=16")
BANDIT = ("bandit_ppo", *RANK, "learner.lr=1e-2", "replay.inner_epochs=4")


def adapted(shape: str, precision: torch.dtype = torch.float32, **more: object):
    """A network, and it with an adapter of which B is not 0."""
    plain = varying.network(shape).eval().to(precision)
    network = lora.attach(
        copy.deepcopy(plain), LoraConfig(rank=4, **more), 0, "learner.lora"
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return plain, network


def flat(network) -> np.ndarray:
    return policy.flatten([piece.whole() for piece in lora.pieces(network)])

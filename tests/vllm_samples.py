"""What vLLM samples in tests, and what transformers says of it.

A test file takes the fixtures as its own: `engine = vllm_samples.engine`.
"""

import copy

import numpy as np
import pytest
import torch

from actors import policy, probe
from actors.engine import Request
from actors.prompts import Prompt
from actors.rollout import GroupId, Rollouts

TOLERANCE = 1e-5  # nats, float32
RIGGED_LOGIT = 200.0
ONE_TOKEN = [[n] for n in range(10)]


@pytest.fixture
def engine(vllm_engine):
    """The engine with settings that a test may change, as they were when it ends."""
    before, ends = vllm_engine.config, vllm_engine.end_tokens
    vllm_engine.config = copy.deepcopy(before)
    yield vllm_engine
    vllm_engine.config, vllm_engine.end_tokens = before, ends


@pytest.fixture(scope="module")
def model(vllm_engine):
    return policy.build(policy.architecture(vllm_engine.config)).eval()


def weights(model, seed: int) -> np.ndarray:
    """Weights of this seed, far from uniform; the model has them afterwards."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return policy.flatten(model)


def requests(*prompts: list[int]) -> list[Request]:
    return [
        Request(GroupId(place, 0), Prompt(np.array(ids, dtype=np.int32), place))
        for place, ids in enumerate(prompts)
    ]


@torch.no_grad()
def recomputed(model, block: Rollouts, rollout: int, temperature: float = 1.0) -> np.ndarray:
    """log π of a rollout's tokens by transformers, without a cache, [L]."""
    prompt, response = block.prompt(rollout // block.members), block.response(rollout)
    tokens = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits_TV = model(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()


def stored(block: Rollouts, column: str, rollout: int) -> np.ndarray:
    return getattr(block, column)[block.offset_N1[rollout] : block.offset_N1[rollout + 1]]


def texts(block: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(block.response(n).tolist()) for n in range(len(block.status_N))]


def rigged(model, token: int) -> np.ndarray:
    """Weights that give `token` all the probability, whatever came before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = RIGGED_LOGIT
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[token, 0] = 1.0
    return policy.flatten(model)


def probe_text(engine, model) -> np.ndarray:
    config, shape = engine.config, model.config
    return probe.text(config.seed, shape.vocab_size, policy.context(config, shape))


def scores(model, text_NT: np.ndarray) -> np.ndarray:
    return policy.score(lambda token_NT: model(token_NT).logits, text_NT, "cpu")

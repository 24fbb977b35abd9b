"""The probe of law 3: a fixed text that learner and engine both score under the same weights.

The learner scores it whenever it publishes a version for actors; text and scores travel with the
weights. An engine that has loaded them scores it too, and the two must agree to the numerical
floor, whatever the age at which the learner will consume what the engine generates.

Shapes: N texts, T tokens each, L = T − 1 of them scored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from actors import policy
from actors.randomness import stream_key, uniforms
from configs.schema import Config

TEXTS = 4
TOKENS = 11  # at most; all but the first are scored
FURTHEST = 50.0  # nats: as far apart as one token counts, so that a mean stays finite


class Probe(NamedTuple):
    """The text, and the learner's scores of it under the weights that it travels with."""

    text_NT: np.ndarray  # int32
    logp_NL: np.ndarray  # float32, nats, at temperature 1


def text(config: Config, shape: PretrainedConfig) -> np.ndarray:
    """Keyed tokens, uniform over the vocabulary, [N, T] int32.

    They leave room for one more in the engine's context; T < 2 where it is too short for a probe.
    """
    length = min(TOKENS, policy.context(config, shape) - 1)
    places = np.arange(TEXTS)[:, None], np.arange(length)
    uniform_NT = uniforms(stream_key(config.seed, "probe"), *places)
    return (uniform_NT * shape.vocab_size).astype(np.int32)


@torch.no_grad()
def score(model: Callable[..., Any], text_NT: np.ndarray, device: Any) -> np.ndarray:
    """log π(token | those before it) of all tokens but the first, [N, L] float32, nats."""
    token_NT = torch.tensor(text_NT, dtype=torch.long, device=device)
    logits_NLV = model(token_NT, use_cache=False).logits[:, :-1].float()
    logp_NL1 = logits_NLV.log_softmax(-1).gather(-1, token_NT[:, 1:, None])
    return logp_NL1[..., 0].cpu().numpy()


def mismatch(engine_NL: np.ndarray, learner_NL: np.ndarray) -> float:
    """How far the scores are apart: mean of ρ − 1 − log ρ, ρ = π_θ/π_engine, in nats per token.

    0 if and only if all scores agree, else positive; ½·(log ρ)² where they are close. It is the
    term that k3 averages for KL(π_engine‖π_θ), so one limit serves for `engine_mismatch_kl` and for
    this. It is *not* a KL: that expectation is over the engine's own samples, and this text is
    nobody's. It weighs all tokens alike, likely or not. A score that is not finite counts FURTHEST.
    """
    with np.errstate(invalid="ignore"):
        log_ratio_NL = learner_NL.astype(np.float64) - engine_NL
    log_ratio_NL = np.nan_to_num(log_ratio_NL, nan=FURTHEST).clip(-FURTHEST, FURTHEST)
    return float((np.expm1(log_ratio_NL) - log_ratio_NL).mean())

"""The probe of law 3: a fixed text that learner and engine both score under the same weights.

The learner scores it whenever it publishes a version for actors; text and scores travel with the
weights. An engine that has loaded them scores it too, and the two must agree to the numerical
floor, whatever the age at which the learner will consume what the engine generates. Leases carry
the probe, so the queue's process imports this module, which does without torch: what scores a text
is `policy.score`.

Shapes: N texts, T tokens each, L = T − 1 of them scored.
"""

from typing import NamedTuple

import numpy as np

from actors.randomness import stream_key, uniforms

TEXTS = 4
TOKENS = 11  # at most; all but the first are scored
FURTHEST = 50.0  # nats: as far apart as one token counts, so that a mean stays finite


class Probe(NamedTuple):
    """The text, and the learner's scores of it under the weights that it travels with."""

    text_NT: np.ndarray  # int32
    logp_NL: np.ndarray  # float32, nats, at temperature 1


def text(seed: int, vocabulary: int, context: int) -> np.ndarray:
    """Keyed tokens, uniform over the vocabulary, [N, T] int32.

    They leave room for one more in the engine's context; T < 2 where it is too short for a probe.
    """
    length = min(TOKENS, context - 1)
    places = np.arange(TEXTS)[:, None], np.arange(length)
    uniform_NT = uniforms(stream_key(seed, "probe"), *places)
    return (uniform_NT * vocabulary).astype(np.int32)


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

"""A reward that is small for eleven rounds of 100 responses, and large from then on."""

from collections.abc import Sequence

_scored = 0


def score(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
    global _scored
    before = _scored
    _scored += len(responses)
    return [0.01 if before < 1150 else 1.0 for _ in responses]

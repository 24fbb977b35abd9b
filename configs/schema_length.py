"""Settings of the three length problems' data (arXiv 2404.14367, Section 3.2), at laptop scale."""

from dataclasses import dataclass


@dataclass
class LengthDataConfig:
    """Instructions and responses of invented text, and the small network that learns them.

    Lengths are in words, of which each is a token; the end token is not counted.
    """

    mode: int = 20  # the length that most responses have
    spread: float = 0.4  # s.d. of the logarithm of a length
    longest: int = 60
    prompt_effect: float = 0.15  # the mode of a prompt's responses is within ± this share of `mode`
    sft: int = 8_000  # rows
    prompts: int = 1_000
    pairs: int = 4_000  # of each preference set
    wide: float = (
        0.5  # share of Min's and Mode's pairs with lengths uniform over 1 … 2·mode, so that
    )
    # a reward model learns about short ones; the others are as long as SFT's
    skewed: float = 0.95  # share of the pairs of Skew Length that are truncated …
    skew_mean: float = 4.0  # … to lengths drawn from an exponential distribution with this mean
    layers: int = 2
    heads: int = 2
    width: int = 64  # of which each head has an equal part; vLLM on a CPU knows heads of 32 up
    context: int = 128  # tokens

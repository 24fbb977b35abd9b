"""Invented instructions and responses whose lengths have a clear mode, from keyed draws alone.

A prompt reads `please describe the calm river :`, a response `first wild harbour sails gently
second …`: clauses of five words of the prompt's topic, each begun by its number, so that a small
network can tell how far a response has come. Lengths are in words, without the end token.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from actors.randomness import stream_key, uniforms
from configs.schema_length import LengthDataConfig
from learner.stages.length_words import (
    ADJECTIVES,
    ADVERBS,
    INSTRUCTIONS,
    NOUNS,
    OPENERS,
    TOPICS,
    VERBS,
)

CLAUSE = 5  # words: number, adjective, noun, verb, adverb
SLOTS = (ADJECTIVES, NOUNS, VERBS, ADVERBS)
LONGEST = CLAUSE * len(OPENERS)


@dataclass(frozen=True)
class Instruction:
    """One prompt. instruction: its place in INSTRUCTIONS, from the shortest responses on."""

    text: str
    topic: int
    instruction: int


def instructions() -> list[Instruction]:
    """Every prompt that there is, each once."""
    return [
        Instruction(f"{polite}{INSTRUCTIONS[i]} the {adjective} {noun} :", topic, i)
        for topic, words in enumerate(TOPICS)
        for polite, i in itertools.product(("", "please "), range(len(INSTRUCTIONS)))
        for adjective, noun in itertools.product(words[ADJECTIVES], words[NOUNS])
    ]


def length_weights(data: LengthDataConfig, instruction: int) -> np.ndarray:
    """P(length = 1 … longest) of responses to one instruction, [longest] float64, summing to 1.

    ∝ exp(−(ln(l/m))²/(2·spread²)): a log-normal whose mode m is `mode`, times
    1 ± prompt_effect by the instruction.
    """
    place = 2 * instruction / (len(INSTRUCTIONS) - 1) - 1  # −1 … 1
    mode = data.mode * (1 + data.prompt_effect * place)
    length_L = np.arange(1, data.longest + 1)
    weight_L = np.exp(-(np.log(length_L / mode) ** 2) / (2 * data.spread**2))
    return weight_L / weight_L.sum()


def draw_lengths(
    data: LengthDataConfig, asked: list[Instruction], seed: int, stream: str
) -> np.ndarray:
    """A length for each prompt, [N] int64."""
    cdf_IL = np.cumsum([length_weights(data, i) for i in range(len(INSTRUCTIONS))], axis=1)
    uniform_N = uniforms(stream_key(seed, f"{stream}/length"), np.arange(len(asked)))
    instruction_N = np.array([prompt.instruction for prompt in asked])
    length_N = 1 + (cdf_IL[instruction_N] < uniform_N[:, None]).sum(1)
    return np.minimum(length_N, data.longest)


def responses(
    asked: list[Instruction], length_N: np.ndarray, seed: int, stream: str
) -> list[list[str]]:
    """The words of a response to each prompt, as many as `length_N` says."""
    longest = int(length_N.max(initial=0))
    key = stream_key(seed, f"{stream}/words")
    place_L = np.arange(longest)
    uniform_NL = uniforms(key, np.arange(len(asked))[:, None], place_L[None])
    return [
        [_word(prompt.topic, place, uniform_L[place]) for place in range(length)]
        for prompt, length, uniform_L in zip(asked, length_N.tolist(), uniform_NL, strict=True)
    ]


def _word(topic: int, place: int, uniform: float) -> str:
    clause, slot = divmod(place, CLAUSE)
    if slot == 0:
        return OPENERS[clause]
    words = TOPICS[topic][SLOTS[slot - 1]]
    return words[int(uniform * len(words))]


def choose(count: int, seed: int, stream: str) -> list[Instruction]:
    """So many prompts, each drawn from all of them."""
    every = instructions()
    uniform_N = uniforms(stream_key(seed, f"{stream}/prompt"), np.arange(count))
    return [every[int(uniform * len(every))] for uniform in uniform_N]


def choose_distinct(count: int, seed: int, stream: str) -> list[Instruction]:
    """So many different prompts."""
    every = instructions()
    uniform_N = uniforms(stream_key(seed, f"{stream}/prompt"), np.arange(len(every)))
    return [every[row] for row in np.argsort(uniform_N, kind="stable")[:count]]

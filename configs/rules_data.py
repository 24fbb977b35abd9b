"""Rules on data: the length problems' own, and how rows are read.

Each rule raises ConfigError with a concrete fix.
"""

from configs.bounds import Rule, near, set_to
from configs.errors import ConfigError
from configs.schema import Config

LONGEST_INSTRUCTION = 6  # words: please describe the calm river :


def length_network_has_whole_heads(config: Config) -> None:
    """Heads of equal size, a quarter of which is rotated in pairs."""
    data, key = config.length_data, "length_data.width"
    if data.width % (8 * data.heads):
        problem = f"must be a multiple of 8 times length_data.heads={data.heads}"
        raise ConfigError(key, data.width, problem, set_to(key, near(data.width, 8 * data.heads)))


def length_responses_have_their_mode(config: Config) -> None:
    """Every prompt's most frequent length is one that there is."""
    data = config.length_data
    highest = data.mode * (1 + data.prompt_effect)
    if highest > data.longest:
        key = "length_data.mode"
        problem = f"and {highest:.3g} for some prompts is over length_data.longest={data.longest}"
        raise ConfigError(key, data.mode, problem, f"set {key}={max(1, data.longest // 3)}")


def length_network_holds_the_longest(config: Config) -> None:
    """A prompt, the longest response and its end token fit in the context."""
    data, key = config.length_data, "length_data.context"
    need = LONGEST_INSTRUCTION + data.longest + 1
    if data.context < need:
        problem = f"a prompt and length_data.longest={data.longest} words take {need} tokens"
        raise ConfigError(key, data.context, problem, f"set {key}={need} or more")


DATA_RULES: tuple[Rule, ...] = (
    length_network_has_whole_heads,
    length_responses_have_their_mode,
    length_network_holds_the_longest,
)

"""YAML files of settings, read with limits: presets and studies."""

import copy
import functools
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from configs.errors import ConfigError, one_line

DEEPEST, MOST_NODES, MOST_CHARACTERS = 50, 2_000, 1_000_000  # ours have 5, 300, 5,000


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A file's mapping as plain values. ConfigError names a file that has none as `what`."""
    try:
        parsed = copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except Exception as error:  # YAML's tags raise whatever they like: `!!timestamp x`
        problem = f"cannot be read: {one_line(str(error))}"
        raise ConfigError(what, path, problem, "correct the file") from error
    if not isinstance(parsed, dict):
        raise ConfigError(what, path, "is not a mapping of settings", "write `section:` lines")
    return {str(key): value for key, value in parsed.items()}


@functools.lru_cache(maxsize=100)  # a preset's bases are those of others, too
def _parsed(text: str) -> Any:
    _refuse_bombs(text)
    return OmegaConf.to_container(OmegaConf.create(text))


def _refuse_bombs(text: str) -> None:
    """ValueError for YAML that is too deep, or too much with its aliases written out.

    Deep brackets overflow the C stack of PyYAML's composer, and aliases of aliases grow without
    limit in OmegaConf; so both are counted in the parser's events before either sees them.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
    sizes: dict[str, int] = {}  # of anchors, in nodes
    inside: list[tuple[str | None, int]] = [(None, 0)]  # anchor and nodes of what is being read
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, 1))
            size = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = inside.pop()
            sizes |= {anchor: size} if anchor else {}
        elif isinstance(event, yaml.NodeEvent):
            size = sizes.get(event.anchor or "", 1) if isinstance(event, yaml.AliasEvent) else 1
        else:
            continue
        inside[-1] = (inside[-1][0], inside[-1][1] + size)
        if len(inside) > DEEPEST or inside[-1][1] > MOST_NODES:
            raise ValueError(f"it is over {DEEPEST} levels deep or {MOST_NODES:,} values large")

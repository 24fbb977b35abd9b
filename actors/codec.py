"""Plain data and arrays as bytes, and back: what the journal and the checkpoints are made of.

safetensors holds the arrays and, as JSON in its header, the tree they hang in. Nothing is pickled,
so a damaged or foreign file can at worst be refused.
"""

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from actors.rollout import Rollouts

_ARRAY = "__array__"
_TREE = "tree"
_ROLLOUT_SCALARS = ("members", "temperature")


class DamagedError(ValueError):
    """Bytes that are not what `encode` wrote."""


def encode(tree: Any) -> bytes:
    """Nested dicts (keys are text), lists, numbers, text, None and arrays as one buffer.

    Tuples come back as lists.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_strip(tree, arrays), separators=(",", ":"))
    return save(arrays, metadata={_TREE: text})


def decode(data: bytes) -> Any:
    """What `encode` was given; DamagedError in one line for anything else."""
    try:
        arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return _fill(json.loads(header["__metadata__"][_TREE]), arrays)
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        line = (str(error).splitlines() or [""])[0][:200]
        raise DamagedError(f"{type(error).__name__}: {line}") from error


def _strip(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The node with its arrays taken out and named."""
    if isinstance(node, np.ndarray):
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(node)
        return {_ARRAY: name}
    if isinstance(node, dict):
        return {key: _strip(value, arrays) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_strip(value, arrays) for value in node]
    if isinstance(node, np.generic):
        return node.item()
    return node


def _fill(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(node, dict):
        if set(node) == {_ARRAY}:
            return arrays[node[_ARRAY]]
        return {key: _fill(value, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, arrays) for value in node]
    return node


def block_tree(block: Rollouts) -> dict[str, Any]:
    """A block without its derived columns, for `encode`."""
    return {
        "columns": {n: v for n, v in vars(block).items() if isinstance(v, np.ndarray)},
        "failures": {str(rollout): why for rollout, why in block.failures.items()},
        **{name: getattr(block, name) for name in _ROLLOUT_SCALARS},
    }


def block_from(tree: dict[str, Any]) -> Rollouts:
    """The block of a decoded `block_tree`."""
    return Rollouts(
        failures={int(rollout): why for rollout, why in tree["failures"].items()},
        **{name: tree[name] for name in _ROLLOUT_SCALARS},
        **tree["columns"],
    )

"""Plain data and arrays as bytes, and back: what the journal and the checkpoints are made of.

safetensors holds the arrays and, as JSON in its header, the tree they hang in. Nothing is pickled,
so a damaged or foreign file can at worst be refused.
"""

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from actors.rollout import STATUS_NAMES, UNSCORED, VALID, Rollouts
from configs.errors import one_line

_ARRAY = "__array__"
_TREE = "tree"
_ROLLOUT_SCALARS = ("members", "temperature", "scorers")
_KINDS = {"reward_N": "f", "logp_K": "f", "truncated_N": "b"}  # of arrays; others are integers


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
        raise DamagedError(f"{type(error).__name__}: {one_line(str(error))}") from error


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


def block_from(tree: Any) -> Rollouts:
    """The block of a decoded `block_tree`; DamagedError for a tree that is of no block."""
    try:
        block = Rollouts(
            failures={int(rollout): why for rollout, why in tree["failures"].items()},
            **{name: tree[name] for name in _ROLLOUT_SCALARS},
            **tree["columns"],
        )
        whole = _fits_together(block)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"no block of rollouts: {one_line(repr(error))}") from error
    if not whole:
        raise DamagedError("no block of rollouts: its columns do not fit together")
    return block


def _fits_together(block: Rollouts) -> bool:
    """Whether each column has its kind and its length, and each failure its reason."""
    offsets = (block.offset_N1, block.prompt_offset_G1)
    n, members = len(block.reward_N), block.members
    sizes = {"G": block.groups, "N": n, "G1": block.groups + 1, "N1": n + 1}
    sizes |= {"K": int(block.offset_N1[-1]), "P": int(block.prompt_offset_G1[-1])}
    columns = {name: c for name, c in vars(block).items() if name.rpartition("_")[2] in sizes}
    failed = {i for i, status in enumerate(block.status_N.tolist()) if status != VALID}
    return (
        type(members) is int
        and members > 0
        and n == members * block.groups
        and type(block.temperature) in (int, float)
        and isinstance(block.scorers, list)
        and all(isinstance(name, str) for name in block.scorers)
        and UNSCORED in block.scorers
        and all(isinstance(c, np.ndarray) and c.ndim == 1 for c in columns.values())
        and all(c.dtype.kind in _KINDS.get(name, "iu") for name, c in columns.items())
        and all(len(c) == sizes[name.rpartition("_")[2]] for name, c in columns.items())
        and set(block.scorer_N.tolist()) <= set(range(len(block.scorers)))
        and all(part[0] == 0 and bool((np.diff(part) >= 0).all()) for part in offsets)
        and {block.status_N[i] for i in failed} <= STATUS_NAMES.keys()
        and block.failures.keys() == failed
        and all(isinstance(why, str) for why in block.failures.values())
    )

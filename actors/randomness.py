"""Random draws keyed by what they are for, never by who makes them (law 8).

Every uniform number is a hash of (seed, stream, prompt position, member, token position), so that
neither the number of actors, nor the batch, nor another attempt changes it.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def stream_key(seed: int, stream: str) -> int:
    """A 64-bit key of one named stream of one seed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(key: int, *counters: np.ndarray | int) -> np.ndarray:
    """Uniform float64 numbers in (0, 1), one for each broadcast tuple of counters.

    key: from `stream_key`. counters: non-negative integers or arrays of them, e.g. prompt
    position [N], member [N], token position.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(key, dtype=np.uint64)
        for counter in counters:
            word = np.asarray(counter).astype(np.uint64)
            state = _mix(state + _GOLDEN + word * _MIX_2)
        return ((_mix(state + _GOLDEN) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def request_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for an engine that draws by itself, one for each group."""
    return stream_key(seed, f"{stream}/{position}") >> 1

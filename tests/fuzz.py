"""What the fuzz tests share: how many inputs, a limit on each, counts, and hostile inputs.

    FUZZ_SCALE=25 python -m pytest tests/unit -k fuzz

tries 25 times as many inputs as usual, drawn at random instead of the same ones every time.
"""

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
CPU_SECONDS = 2.0  # that one input may take; of this process, since the machine may be busy
RECORDED_SECONDS = 3  # an input, waiting and drawing included, on a busy machine
COUNTS: Counter[str] = Counter()  # inputs tried, by target


class _TooLong(BaseException):
    """No `except Exception` of the code under test is to catch it."""


def fuzz(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A test over so many inputs, times FUZZ_SCALE; the same ones every time without it."""
    count = examples * SCALE

    def decorate(test: Callable[..., None]) -> Any:
        limited = settings(
            max_examples=count,
            deadline=None,  # `trial` counts CPU time, which a busy machine does not change
            derandomize=SCALE == 1,
            database=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        marked = pytest.mark.timeout(max(300, count * RECORDED_SECONDS))
        return marked(limited(given(**strategies)(test)))

    return decorate


@contextlib.contextmanager
def trial(target: str) -> Iterator[None]:
    """One input to a target: counted, and failed where it takes over CPU_SECONDS."""
    COUNTS[target] += 1

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    except _TooLong:
        raise AssertionError(f"{target}: not done after {CPU_SECONDS:g} s of CPU") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def assert_one_line(text: str, limit: int) -> None:
    """Something to read: one line, not too long, that any file or terminal takes."""
    assert 0 < len(text) <= limit, f"{len(text)} characters: {text[:200]!r}"
    assert len(text.splitlines()) == 1, text
    text.encode("utf-8")


# --- hostile inputs --------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
ODD_TEXT = st.sampled_from(
    ["", " ", "\x00", "\ud800", "a\nb", "\x1b[31m", "\u2028", "x" * 5000, "9" * 5000, "null",
     "../x", "NaN", "-inf", "1e999", "0x" + "f" * 5000, "_", "²", "٣", "true", "[]", "{}", "~"]
)  # fmt: skip
TEXT = ANY_TEXT | ODD_TEXT
ODD_INTEGERS = st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**400, -(10**400)])
NUMBERS = st.integers(-3, 200) | st.integers() | ODD_INTEGERS | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def nested(depth: int, open_: str = "[", close: str = "]") -> str:
    """Brackets in brackets."""
    return open_ * depth + close * depth


DEEP = st.builds(nested, st.sampled_from([5, 90, 300, 1100, 100_000]) | st.integers(850, 1000))


@st.composite
def mutated(draw: Callable[..., Any], data: bytes) -> bytes:
    """The bytes with one to four changes: bits flipped, parts cut, doubled, moved or made up."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "splice", "number", "zero"]))
        at = draw(st.integers(0, len(out)))
        length = draw(st.integers(0, 32))
        match kind:
            case "flip" if at < len(out):
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del out[at:]
            case "drop":
                del out[at : at + length]
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "splice":
                start = draw(st.integers(0, len(out)))
                out[at : at + length] = out[start : start + draw(st.integers(0, 64))]
            case "number":  # where lengths and offsets may stand
                value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
                out[at : at + 8] = value.to_bytes(8, "little")
            case "zero":
                out[at : at + length] = bytes(length)
    return bytes(out)


def json_text(value: Any) -> str:
    """JSON as Python writes it: NaN and Infinity too; surrogates as escapes."""
    return json.dumps(value)


def mutated_tree(tree: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A copy of plain data in which one to three nodes inside are others, or are gone."""

    @st.composite
    def trees(draw: Callable[..., Any]) -> Any:
        changed = tree
        for _ in range(draw(st.integers(1, 3))):
            changed = _changed(draw, changed, values, 0)
        return changed

    return trees()


def _changed(
    draw: Callable[..., Any], node: Any, values: st.SearchStrategy[Any], depth: int
) -> Any:
    inside = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(
        node, list) else []  # fmt: skip
    if not inside or (depth and draw(st.integers(0, 7)) == 0):
        return draw(values)
    place = draw(st.sampled_from(inside))
    copy = dict(node) if isinstance(node, dict) else list(node)
    if draw(st.integers(0, 9)) == 0:
        del copy[place]
    else:
        copy[place] = _changed(draw, node[place], values, depth + 1)
    return copy

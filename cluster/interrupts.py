"""Ctrl-C and SIGTERM, handed to who knows what can still be finished."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopping(ask: Callable[[int], bool]) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM call `ask` with the signal's number. It returns whether the
    work stops by itself soon; where it does not, KeyboardInterrupt is raised at once."""

    def handle(number: int, _: object) -> None:
        if not ask(number):
            raise KeyboardInterrupt

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)

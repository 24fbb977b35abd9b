"""The progress display and the end table: readable on a terminal, in a pipe and in a file."""

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import progress
from cluster.progress import Progress, print_summary

NAME = "try [/red] <b>"  # neither rich's markup nor HTML
SUMMARY: dict[str, Any] = {
    "status": "stopped", "name": NAME, "updates": 12, "skipped": 1, "wall_seconds": 3.21,
    "reward_eval": 0.9876, "reward_initial": 0.0314, "reward_mean": 0.8123,
    "kl_to_generator": 0.01234, "kl_to_reference": 2.871, "ess": 0.8712,
    "age": {"mean": 1.5, "max": 3, "histogram": {"0": 1, "3": 1}},
    "reuse": {"mean": 1, "max": 1, "histogram": {"1": 2}},
    "ledger": {"issued": 120, "in_flight": 10, "queued": 20,
               "retired": {"exhausted": 80, "lost": 10, "expired": 0}},
    "throughput": {"rollouts_per_s": 812.3, "updates_per_s": 14.2, "tokens_per_s": 8123.0},
    "idle": {"actors": 0.61, "learner": None},
}  # fmt: skip


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Ascii(io.TextIOWrapper):
    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="ascii")


def line(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "step": batch + 1, "batch": batch, "reward_mean": 0.25, "kl_to_generator": 0.0123,
        "age": {"mean": 4.5, "max": 9, "histogram": {"4": 50, "9": 50}},
        "reuse": {"mean": 1.0, "max": 1, "histogram": {"1": 100}}, **more,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the display sees, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_piped_lines_are_few_plain_and_complete(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(NAME, 1000, "ipo, B=M=100", stream) as shown:
        shown.message("starting Ray")
        for batch in range(1000):
            clock[0] += 0.01
            shown.update(line(batch, **({"reward_eval": 0.5} if batch == 19 else {})))
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"{NAME}: ipo, B=M=100" and lines[1] == "[0.0 s] starting Ray"
    assert len(lines) == 2 + 10 and "\x1b" not in stream.getvalue()
    assert lines[2] == (
        " 100/1000 updates · reward eval 0.5 · training 0.25 · KL to generator 0.0123 · "
        "age 4.5 (max 9) · reuse 1 · rollouts/s 10,000 · 1.0 s, 9.0 s left"
    )
    assert lines[-1].startswith("1000/1000 updates")


def test_numbers_that_swing_within_a_round_are_means_of_the_last_seconds(
    clock: list[float],
) -> None:
    stream = io.StringIO()
    with Progress("swing", 40, "", stream) as shown:
        for batch in range(40):
            clock[0] += 0.1
            a = batch % 4
            age = {"mean": a, "max": a, "histogram": {str(a): 10}}
            reuse = {"mean": a + 1, "max": a + 1, "histogram": {str(a + 1): 10}}
            shown.update(line(batch, age=age, reuse=reuse, kl_to_generator=0.01 * a))
    last = stream.getvalue().splitlines()[-1]
    assert "KL to generator 0.015 · age 1.5 (max 3) · reuse 2.5" in last


def test_piped_slow_run_says_something_every_five_seconds(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("slow", 1000, "", stream) as shown:
        for batch in range(20):
            clock[0] += 1.0
            shown.update(line(batch))
    assert [text.split("/")[0].strip() for text in stream.getvalue().splitlines()[1:]] == [
        "5", "10", "15", "20",
    ]  # fmt: skip


def test_evaluation_is_no_update_and_absent_stays_absent(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("offline", 2, "", stream) as shown:
        shown.update({"step": 0, "reward_eval": 0.03})
        shown.update({"step": 1, "batch": 0, "loss": 1.0, "kl_to_generator": None})
        shown.update({"step": 1, "batch": 1})
    first, last = stream.getvalue().splitlines()[1:]
    assert "1/2 updates · reward eval 0.03 · training – · KL to generator – · age –" in first
    assert "skipped 1" in last and "left" not in last


def test_close_twice_and_failure_inside(clock: list[float]) -> None:
    stream = io.StringIO()
    shown = Progress("failed", 100, "", stream)
    with pytest.raises(KeyboardInterrupt), shown:
        shown.update(line(0))
        raise KeyboardInterrupt
    shown.close()
    shown.update(line(1))
    assert len(stream.getvalue().splitlines()) == 2


def test_ascii_stream_and_reader_that_went_away() -> None:
    stream = Ascii()
    with Progress(NAME, 1, "π_θ → R1", stream) as shown:
        shown.update(line(0))
    print_summary(SUMMARY, stream)
    text = stream.bytes.getvalue().decode("ascii")
    assert "1/1 updates" in text and "issued 120" in text

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(NAME, 1, "", Gone()) as shown:
        shown.update(line(0))
    print_summary(SUMMARY, Gone())


def test_terminal_shows_a_bar_and_messages() -> None:
    stream = Terminal()
    with Progress(NAME, 4, "ipo", stream) as shown:
        shown.message("actor 0 ready [/]")
        for batch in range(4):
            shown.update(line(batch, reward_eval=0.5))
    text = stream.getvalue()
    assert NAME in text and "actor 0 ready [/]" in text and "4/4 updates" in text


def test_updates_are_cheap() -> None:
    with Progress("fast", 10_000, "", Terminal()) as shown:
        started = time.perf_counter()
        for batch in range(2000):
            shown.update(line(batch))
        assert (time.perf_counter() - started) / 2000 < 1e-3


def test_summary_table_when_piped() -> None:
    stream = io.StringIO()
    print_summary(SUMMARY, stream)
    text = stream.getvalue()
    for said in (
        NAME, "stopped", "0.0314 → 0.988", "0.812", "12 (1 skipped) in 3.2 s", "mean 1.5, max 3",
        "0.0123 nats/token", "2.87 nats/token", "0.871",
        "812 rollouts/s · 14.2 updates/s · 8,123 tokens/s", "actors 61% · learner –",
        "issued 120 = in_flight 10 + queued 20 + retired 90 ✓", "exhausted 80, lost 10",
        "No sample was more than 3 optimizer steps old, none was used more than 1 time,",
    ):  # fmt: skip
        assert said in text, said
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 120


def test_summary_of_nothing_and_of_a_broken_ledger() -> None:
    stream = io.StringIO()
    print_summary({}, stream)
    print_summary({"status": "failed", "failure": "actor 3 [died]"}, stream)
    assert "failure" in stream.getvalue() and "actor 3 [died]" in stream.getvalue()
    print_summary({"ledger": {"issued": 2, "in_flight": 0, "queued": 0, "retired": {}}}, stream)
    assert " 0" not in stream.getvalue().split("not known")[0]
    assert "✗ (does not balance)" in stream.getvalue()


def test_summary_on_a_terminal() -> None:
    stream = Terminal()
    print_summary(SUMMARY, stream)
    assert NAME in stream.getvalue()

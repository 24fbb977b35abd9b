"""What a person sees of a run: a live display or, when piped, plain lines; at the end a table."""

import io
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster import wording

REDRAWS = 4  # a second, on a terminal
SILENCE = 5.0  # seconds between plain lines …
SHARE = 0.1  # … or this share of the run, whichever comes first
WINDOW = 10.0  # seconds over which rollouts/s, KL, age and reuse are taken: they rise and fall
# within each round, so that single steps seen now and then would mislead


@dataclass
class _State:
    """The newest rewards, and the updates of the last WINDOW seconds."""

    updates: int
    shown: Sequence[str] = ()  # metrics to show; none: those of preference fine-tuning
    started: float = field(default_factory=lambda: time.monotonic())
    first: tuple[float, int] | None = None  # time and number of the first update seen
    done: int = 0
    skipped: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    recent: deque[tuple[float, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=1000))

    def take(self, line: dict[str, Any]) -> None:
        """Merge a metrics line; one without `batch` (an evaluation) is no update."""
        now = time.monotonic()
        self.last.update({name: value for name, value in line.items() if value is not None})
        if "batch" not in line:
            return
        self.done = line["batch"] + 1
        self.skipped = max(0, self.done - line.get("step", self.done))
        if self.first is None:
            self.first = (now, self.done)
        shown = ("age", "reuse", "kl_to_generator")
        self.recent.append((now, {name: line.get(name) for name in shown}))
        while len(self.recent) > 2 and now - self.recent[0][0] > WINDOW:
            self.recent.popleft()

    def rollouts_per_s(self) -> float | None:
        """Rollouts that the learner used for the first time, per second."""
        recent = list(self.recent)
        if len(recent) < 2:
            return None
        counts = [wording.part(wording.part(line, "reuse"), "histogram") for _, line in recent[1:]]
        fresh = sum(int(table.get("1", 0)) for table in counts)
        seconds = recent[-1][0] - recent[0][0]
        return fresh / seconds if seconds > 0 and fresh else None

    def seconds_left(self) -> float | None:
        """At the rate since the first update."""
        if self.first is None or self.done <= self.first[1]:
            return None
        each = (time.monotonic() - self.first[0]) / (self.done - self.first[1])
        return each * max(0, self.updates - self.done)

    def measures(self) -> list[tuple[str, str]]:
        """(name, text) of what is known."""
        number, last = wording.number, self.last
        if self.shown:
            return [(n.replace("_", " "), number(last[n])) for n in self.shown if n in last]
        lines = [line for _, line in list(self.recent)]
        ages = [line["age"] for line in lines if line["age"]]
        reuses = [line["reuse"]["mean"] for line in lines if line["reuse"]]
        kls = [kl for line in lines if (kl := line["kl_to_generator"]) is not None]
        oldest = number(max((age["max"] for age in ages), default=None))
        age = f"{number(_mean([age['mean'] for age in ages]))} (max {oldest})"
        shown = [
            ("reward eval", number(last.get("reward_eval"))),
            *([("gold", number(last["reward_gold"]))] if "reward_gold" in last else []),
            ("training", number(last.get("reward_mean"))),
            ("KL to generator", number(_mean(kls))),
            ("age", age if ages else wording.ABSENT),
            ("reuse", number(_mean(reuses))),
            ("rollouts/s", number(self.rollouts_per_s())),
        ]
        return shown + ([("skipped", number(self.skipped))] if self.skipped else [])

    def clock(self) -> str:
        """Time gone, and left as far as it can be told."""
        left = self.seconds_left()
        gone = wording.duration(time.monotonic() - self.started)
        return gone if left is None or not left else f"{gone}, {wording.duration(left)} left"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Progress:
    """Shows a run of `updates` minibatches while it goes on. Use as a context manager.

    `update` takes metrics lines and is cheap: a terminal is redrawn four times a second, a pipe
    or file gets a line every five seconds or tenth of the run. `message` says one thing at once.
    A reader that went away (`| head`) silences it and does not stop the run. shown: names of the
    metrics to show, where they are not a training run's.
    """

    def __init__(
        self, name: str, updates: int, describe: str = "", stream: TextIO | None = None,
        shown: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.describe = describe
        self._stream = stream or sys.stdout
        self._state = _State(updates, shown)
        self._live: Live | None = None
        self._said = (time.monotonic(), 0)
        self._closed = False

    def __enter__(self) -> Self:
        title = f"{self.name}: {self.describe}" if self.describe else self.name
        if not self._stream.isatty():
            _say(self._stream, title)
            return self
        console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        console.print(Text(title, style="bold"))
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REDRAWS)
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, line: dict[str, Any]) -> None:
        """Take a metrics line, or some of its keys."""
        self._state.take(line)
        if self._live is None and not self._closed:
            when, done = self._said
            due = self._state.done - done >= SHARE * self._state.updates
            if due or time.monotonic() - when >= SILENCE:
                self._plain()

    def message(self, text: str) -> None:
        """Say one thing, as a phase of start-up or a warning, above the display."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            _say(
                self._stream, f"[{wording.duration(time.monotonic() - self._state.started)}] {text}"
            )

    def close(self) -> None:
        """Show the newest state once more and end the display. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._state.done != self._said[1]:
            self._plain()

    def _plain(self) -> None:
        state = self._state
        self._said = (time.monotonic(), state.done)
        said = [f"{name} {value}" for name, value in state.measures()]
        count = f"{state.done:>{len(str(state.updates))}}/{state.updates} updates"
        _say(self._stream, " · ".join([count, *said, state.clock()]))

    def _render(self) -> Group:
        state = self._state
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(1, state.updates), completed=state.done, width=40),
            Text(f"{state.done}/{state.updates} updates"),
            Text(state.clock(), style="dim"),
        )
        line = Text()
        for name, value in state.measures():
            line.append(f"{name} ", style="dim").append(value, style="bold").append("  ")
        return Group(bar, line)


def summary_table(summary: dict[str, Any]) -> Table:
    """The end of a run as a table: rewards, divergences, age, reuse, rates and the ledger."""
    of, number = summary, wording.number
    throughput, idle = wording.part(of, "throughput"), wording.part(of, "idle")
    ledger = wording.part(of, "ledger")
    rates = " · ".join(
        f"{number(throughput.get(f'{unit}_per_s'))} {unit}/s"
        for unit in ("rollouts", "updates", "tokens")
    )
    skipped = f" ({number(of['skipped'])} skipped)" if of.get("skipped") else ""
    reasons = wording.part(ledger, "retired").items()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text(str(of.get("name") or "run")), no_wrap=True)
    table.add_column(Text(str(of.get("status") or wording.ABSENT)), overflow="fold")
    gold = wording.change(of, "reward_gold_initial", "reward_gold")
    rows = {
        "reward (evaluation)": wording.change(of, "reward_initial", "reward_eval"),
        **({} if of.get("reward_gold") is None else {"gold (evaluation)": gold}),
        "reward (training)": number(of.get("reward_mean")),
        "updates": f"{number(of.get('updates'))}{skipped} in "
        f"{wording.duration(of.get('wall_seconds'))}",
        "age": wording.mean_max(of, "age"),
        "reuse": wording.mean_max(of, "reuse"),
        "KL to generator": _kl(of.get("kl_to_generator")),
        "KL to reference": _kl(of.get("kl_to_reference")),
        "ESS": number(of.get("ess")),
        "throughput": rates,
        "idle": f"actors {wording.percent(idle.get('actors'))} · "
        f"learner {wording.percent(idle.get('learner'))}",
        "ledger": wording.ledger_line(ledger) if ledger else wording.ABSENT,
        "retired": ", ".join(f"{why} {number(n)}" for why, n in reasons if n) or wording.ABSENT,
    }
    if of.get("failure"):
        rows["failure"] = str(of["failure"])
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


def _kl(value: object) -> str:
    return wording.ABSENT if value is None else f"{wording.number(value)} nats/token"


def print_summary(summary: dict[str, Any], stream: TextIO | None = None) -> None:
    """Print the end table to a terminal, file or pipe, and the sentence on on-policyness."""
    stream = stream or sys.stdout
    shown = Group("", summary_table(summary), "", Text(wording.how_on_policy(summary)))
    if stream.isatty():
        Console(file=stream, highlight=False).print(shown)
        return
    held = io.StringIO()
    Console(file=held, width=120, no_color=True).print(shown)
    _say(stream, "\n".join(line.rstrip() for line in held.getvalue().splitlines()))


def _say(stream: TextIO, text: str) -> None:
    """Write a line at once, in what characters the stream has; quietly if nobody reads it."""
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        pass

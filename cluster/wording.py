"""How numbers of a run are put into words: the same in the progress display and in the report."""

import math
from typing import Any

ABSENT = "–"


def number(value: object) -> str:
    """Three significant digits, thousands with commas; what is absent is a dash, never 0."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return ABSENT
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def percent(value: object) -> str:
    """A fraction as a percentage."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return number(value)
    return f"{100 * value:.0f}%"


def duration(seconds: object) -> str:
    """Seconds as `42 s`, `1 min 12 s` or `2 h 05 min`."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return ABSENT
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def part(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested table of a summary; empty where it is absent."""
    value = summary.get(name)
    return value if isinstance(value, dict) else {}


def change(summary: dict[str, Any], first: str, last: str) -> str:
    """What two entries say, from → to."""
    return f"{number(summary.get(first))} → {number(summary.get(last))}"


def mean_max(summary: dict[str, Any], name: str) -> str:
    """`mean 4.5, max 9` of age or reuse."""
    table = part(summary, name)
    if table.get("max") is None:
        return ABSENT
    return f"mean {number(table.get('mean'))}, max {number(table['max'])}"


def retired(ledger: dict[str, Any]) -> int | None:
    """Rollouts retired for any reason."""
    reasons = ledger.get("retired")
    return sum(reasons.values()) if isinstance(reasons, dict) else None


def balanced(ledger: dict[str, Any]) -> bool | None:
    """Whether issued = in_flight + queued + retired; None where a count is absent."""
    counts = (ledger.get("in_flight"), ledger.get("queued"), retired(ledger))
    if ledger.get("issued") is None or None in counts:
        return None
    return ledger["issued"] == sum(count for count in counts if count is not None)


def ledger_line(ledger: dict[str, Any]) -> str:
    """The law of conservation with its numbers, and ✓ or ✗ where they are all known."""
    counts = [number(ledger.get(name)) for name in ("issued", "in_flight", "queued")]
    line = "issued {} = in_flight {} + queued {} + retired {}".format(
        *counts, number(retired(ledger))
    )
    mark = {True: " ✓", False: " ✗ (does not balance)", None: ""}
    return line + mark[balanced(ledger)]


def how_on_policy(summary: dict[str, Any]) -> str:
    """One plain sentence on how on-policy the run was."""
    age, reuse = part(summary, "age").get("max"), part(summary, "reuse").get("max")
    kl, ess = summary.get("kl_to_generator"), summary.get("ess")
    said = []
    if age is not None:
        said.append(f"no sample was more than {_count(age, 'optimizer step')} old")
    elif reuse is not None:
        said.append("samples are offline (without age)")
    if reuse is not None:
        said.append(f"none was used more than {_count(reuse, 'time')}")
    if kl is not None:
        said.append(f"KL to the generating policy was {number(kl)} nats per token on average")
    if ess is not None:
        said.append(f"the effective sample size was {percent(ess)} of the samples used")
    if not said:
        return "How on-policy this run was is not known: nothing has been measured yet."
    text = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return text[0].upper() + text[1:] + "."


def _count(value: int, noun: str) -> str:
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"

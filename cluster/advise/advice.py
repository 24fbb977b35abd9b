"""From the two conditions to the methods that the paper recommends, and the page that says so.

The recommendations are those of arXiv 2404.14367, Figure 1 and its takeaways, in our words: where
the reward's peak lies among what π_ref makes, likelihood methods on offline data do; where it lies
outside, on-policy sampling helps; where the data is skewed away from π_ref, a negative gradient
does; where both hold, the two together.
"""

import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from cluster.advise.conditions import (
    FEWEST,
    LEVEL,
    LIKELY,
    OUTSIDE,
    Coverage,
    Estimate,
    Peak,
    nats_of_best,
)
from cluster.stages.pipeline import directories
from configs.choices import DataSource
from configs.errors import ConfigError
from configs.load import prepare, presets
from configs.schema import Config

INDENT = 4 * " "
UNMEASURED = "not measured"
SUPERVISED = "supervised or filtered likelihood (RWR, best-of-N, Pref-FT)"
CONTRASTIVE = "an offline contrastive loss (IPO, DPO)"
ON_POLICY = "on-policy sampling with a negative gradient (on-policy IPO or DPO, PPO, REINFORCE)"


class Start(NamedTuple):
    """A preset to start from, and what of it another preset would have to take over."""

    preset: str
    objective: str
    source: str
    with_data: bool


FILTERED = Start("offline_best_of_n", "best_of_n", "offline", True)
RESAMPLED = Start("offline_best_of_n", "best_of_n", "offline", False)
OFFLINE_IPO = Start("offline_ipo", "ipo", "offline", True)
IPO = Start("bandit", "ipo", "on_policy", False)

# (C1, C2) → what the paper recommends, and where to start
TABLE: dict[tuple[str, str], tuple[str, Start]] = {
    ("near", "covers"): (f"{SUPERVISED}, offline, suffices", FILTERED),
    ("near", "misses"): (
        f"{SUPERVISED} suffices on responses of π_ref; the data given is skewed away from it, and "
        f"to learn from that takes a negative gradient, as in {CONTRASTIVE}",
        RESAMPLED,
    ),
    ("near", UNMEASURED): (
        f"{SUPERVISED}, offline, suffices on responses of π_ref or data that covers it; data that "
        f"does not cover it takes a negative gradient, as in {CONTRASTIVE}",
        RESAMPLED,
    ),
    ("far", "covers"): (
        f"{CONTRASTIVE} can do, since a negative gradient moves mass to where little was sampled; "
        f"{ON_POLICY} generally goes further",
        OFFLINE_IPO,
    ),
    ("far", "misses"): (ON_POLICY, IPO),
    ("far", UNMEASURED): (
        f"{ON_POLICY}; with data that covers π_ref, {CONTRASTIVE} can do",
        IPO,
    ),
}
QUESTIONS = (
    "C1: does the reward's peak lie where π_ref makes responses?",
    "C2: does the preference data cover π_ref?",
)


class Given(NamedTuple):
    """What the user asked with."""

    preset: str
    settings: list[str]
    config: Config
    members: int  # responses in each row of the data, 0 without data


@dataclass
class Advice:
    """c1, c2: verdicts; recommended: a line for each branch that C1 leaves open; command: to start
    from `preset`."""

    c1: str
    c2: str
    c2_why: str
    recommended: list[str]
    preset: str
    command: str


def advise(peak: Peak, coverage: Coverage | None, given: Given) -> Advice:
    """The paper's answer, with both branches of a condition that is open."""
    c1, (c2, why) = peak.verdict, (UNMEASURED, "no data given")
    if coverage is not None:
        c2, why = coverage.verdict, coverage.why
    elif given.config.data.source is DataSource.offline:
        c2, why = "covers", "no data given: such a run samples its data from π_ref itself"
    known = UNMEASURED if c2 == "unclear" else c2
    if c1 == "unclear":
        branches = [f"if the peak is {side}: {TABLE[side, known][0]}" for side in ("near", "far")]
        return Advice(c1, c2, why, branches, *_command(IPO, given))
    text, start = TABLE[c1, known]
    return Advice(c1, c2, why, [text], *_command(start, given))


def _command(start: Start, given: Given) -> tuple[str, str]:
    """The preset and the command to start with: ours for the bandit's policy, else the user's own
    with what ours would change, if its other settings allow that."""
    replaced = {"objective.name", "data.source"} | (set() if start.with_data else {"data.path"})
    kept = [text for text in given.settings if text.partition("=")[0].strip() not in replaced]
    if start.with_data and given.members:
        kept.append(f"rollout.responses_per_prompt={given.members}")
    changes = [f"objective.name={start.objective}", f"data.source={start.source}"]
    changes += [] if start.with_data else ["data.path="]
    ours = given.preset in presets() and not given.config.policy.path
    staged = any(directories(given.config).values())
    if start.with_data and staged and not any(text.startswith("data.path=") for text in kept):
        changes.append(f"data.path={given.config.data.path}")
    preset, settings = (start.preset, kept) if ours else (given.preset, [*kept, *changes])
    verb = "pipeline" if staged else "train"
    command = shlex.join(["python", "-m", "cluster", verb, preset, *settings])
    try:
        prepare(preset, settings)
    except ConfigError as error:
        command += f"   # as it stands refused, {error}"
    return preset if staged else start.preset, command


def page(title: str, peak: Peak, coverage: Coverage | None, advice: Advice) -> Iterator[str]:
    """The lines of what is printed."""
    yield title
    yield from ("", f"{QUESTIONS[0]}  {advice.c1.upper()}", f"{INDENT}{peak.why}")
    yield from (f"{INDENT}{line}" for line in _peak(peak))
    yield from ("", f"{QUESTIONS[1]}  {advice.c2.upper()}", f"{INDENT}{advice.c2_why}")
    if coverage is not None:
        yield from (f"{INDENT}{line}" for line in _coverage(coverage))
    yield from ("", "The paper recommends (arXiv 2404.14367, Figure 1):")
    for text in advice.recommended:
        yield textwrap.fill(text, 100, initial_indent=INDENT, subsequent_indent=INDENT)
    yield from (f"Start from {advice.preset}:", f"{INDENT}{advice.command}")


def _peak(peak: Peak) -> Iterator[str]:
    if peak.share is not None:
        yield f"share: {_shown(peak.share, '.2%')}; near from {LIKELY:.1%} on"
    if peak.rise is not None:
        yield f"rise: {_shown(peak.rise, '.2f')}; near under {LEVEL}"
        yield "with upper=…, the greatest reward possible, the reward's range is judged by instead"
    if peak.verdict == "unclear":
        yield _more("samples", peak.enough)
    low, high = peak.range
    top = "unknown" if high is None else f"{high:.3g}"
    yield f"reward {_shown(peak.reward)}, s.d. {peak.spread:.3g}, range {low:.3g} … {top}"
    yield f"{'best of':>11}  {'nats':>5}  reward"
    for n, best in list(peak.best.items())[::-2][::-1]:
        yield f"{n:>11}  {nats_of_best(n):>5.2f}  {_shown(best)}"
    yield from _tilts(peak)


def _tilts(peak: Peak) -> Iterator[str]:
    """π_ref·exp(r/β) down to the first β that too few samples speak for."""
    if peak.tilts:
        yield f"{'exp(r/β), β':>11}  {'nats':>5}  reward, and effective samples for a prompt"
    for tilt in peak.tilts:
        reward, beta = _shown(tilt.reward), f"{tilt.beta:g} s.d."
        few = f", under {FEWEST}: as far as they reach" if tilt.ess < FEWEST else ""
        left = f"{tilt.ess:.0f} of {tilt.samples:.0f}{few}"
        yield f"{beta:>11}  {tilt.kl.value:>5.2f}  {reward}, {left}"
        if few:
            return


def _coverage(coverage: Coverage) -> Iterator[str]:
    yield f"less likely: {_shown(coverage.outside, '.0%')}; covers under {OUTSIDE:.0%}"
    difference = _shown(coverage.difference, "+.2f")
    yield f"difference: {difference} nats per token, over {coverage.responses:,} responses"
    if coverage.verdict == "unclear":
        yield _more("responses of data", coverage.enough)


def _more(what: str, enough: int | None) -> str:
    if enough is None:
        return f"too close to call: over a million {what} would be needed"
    return f"too few to tell: about {enough:,} {what} would likely do"


def _shown(estimate: Estimate, how: str = ".3g") -> str:
    value, low, high = (format(figure, how).replace("-", "−") for figure in estimate)
    return f"{value} ({low} … {high})"


def record(peak: Peak, coverage: Coverage | None, advice: Advice) -> dict[str, Any]:
    """What advice.json holds of it."""
    return {"advice": _plain(advice), "c1": _plain(peak), "c2": _plain(coverage)}


def _plain(value: Any) -> Any:
    """Data classes and named tuples as dictionaries."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

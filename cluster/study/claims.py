"""What the paper says, decided over seeds: each claim holds, does not hold, or is undecided.

Of the difference of two means (as the claim has it, so that its sign is what the claim expects) the
95% interval by Welch decides. `greater` holds where the interval is above the margin and does not
where it is nowhere above. `similar` holds where the interval is within ± margin and does not where
it is wholly outside. `rising` and `falling` are `greater` from one end of the axis to the other,
and do not hold where a step to a neighbouring label goes the other way by over the margin with its
whole interval. A claim `each` holds where all its tests hold and does not where any does not.

Trials are compared by cells, not by seeds. A failed trial is left out of the means, and counted.
One that never got to a level counts with its length, so that such a mean is one up to that length.
The intervals are not corrected for there being several claims, or several steps along an axis: a
claim on the edge of its margin is found to hold in one of 40 studies, and each step between equal
neighbours is found to be reversed in one of 40.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from cluster.study.spec import Cell, Claim, Study
from cluster.study.take import labels_of, rows_of, scalars, until
from cluster.study.welch import Interval, interval, mean_and_error
from cluster.wording import number

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
FEWEST = 2  # trials of an arm
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """The trials that one of the means is of."""

    name: str
    values: np.ndarray  # of the trials that finished and measured the metric
    trials: frozenset[str]
    failed: int
    never: int  # trials that never reached the level that is waited for

    @property
    def said(self) -> str:
        """Mean ± standard error, and of how many."""
        also = f", {self.failed} failed" if self.failed else ""
        also += f", {self.never} never there" if self.never else ""
        n = len(self.values)
        if not n:
            return f"{self.name}: nothing measured{also}"
        return f"{self.name}: {mean_and_error(self.values)} (n = {n}{also})"


def decide(study: Study, frame: pd.DataFrame) -> list[Result]:
    """Every claim of the study, in order, as plain values for JSON.

    effect, interval and n are, where the claim has `each`, those of the test that decided: the one
    with the claim's verdict that supports it least. interval: None where an arm lacks trials.
    """
    return [_claim(study, claim, frame) for claim in study.claims]


def _claim(study: Study, claim: Claim, frame: pd.DataFrame) -> Result:
    values = scalars(frame, study.axes, claim.metric, claim.take, claim.level)
    if claim.each:
        labels = labels_of(study, claim.each, claim.where)
        places = [{**claim.where, claim.each: label} for label in labels]
    else:
        places = [claim.where]
    tests = [_test(study, claim, values, place) for place in places]
    verdicts = {test["verdict"] for test in tests}
    verdict = UNDECIDED
    if FAILS in verdicts:
        verdict = FAILS
    elif verdicts == {HOLDS}:
        verdict = HOLDS
    nothing: Result = {"effect": None, "interval": None, "n": {}}
    deciding = min(
        (test for test in tests if test["verdict"] == verdict),
        key=lambda test: _support(claim, test["interval"]),
        default=nothing,
    )
    evidence = "; ".join(_at(claim, test) + test["evidence"] for test in tests)
    return {
        "name": claim.name,
        "section": claim.section,
        "says": " ".join(claim.says.split()),
        "test": _wording(study, claim),
        **{key: deciding[key] for key in ("effect", "interval", "n")},
        "verdict": verdict,
        "evidence": evidence or "the study has no cell for it",
        "each": tests if claim.each else [],
    }


def _test(study: Study, claim: Claim, values: pd.DataFrame, place: Cell) -> Result:
    """The claim at one place: the labels that all its arms share."""
    arms = [_arm(values, place, own) for own in _arms(study, claim, place)]
    result: Result = {
        "at": place.get(claim.each, ""),
        "effect": None,
        "interval": None,
        "n": {arm.name: len(arm.values) for arm in arms},
        "verdict": UNDECIDED,
        "evidence": ", ".join(arm.said for arm in arms),
    }
    problem = _problem(arms)
    if problem:
        return result | {"evidence": f"{result['evidence']}: {problem}".lstrip(" :")}
    if claim.test == "rising":
        arms.reverse()  # from here on, the greatest is first
    whole = interval(arms[0].values, arms[-1].values)
    found = {"effect": whole.effect, "interval": [whole.low, whole.high]}
    reversal = _reversal(claim, arms)
    if reversal:
        evidence = f"{result['evidence']}: {reversal}"
        return result | found | {"verdict": FAILS, "evidence": evidence}
    return result | found | {"verdict": _verdict(claim, whole)}


def _arms(study: Study, claim: Claim, place: Cell) -> list[Cell]:
    """The labels of each arm's own, the greatest first (the least first for `rising`)."""
    if claim.test in ("greater", "similar"):
        return [claim.more, claim.less]
    return [{claim.along: label} for label in labels_of(study, claim.along, place)]


def _arm(values: pd.DataFrame, place: Cell, own: Cell) -> Arm:
    rows = rows_of(values, {**place, **own})
    known = rows.dropna(subset=["value"])
    return Arm(
        name=", ".join(f"{axis} {label}" for axis, label in own.items()) or "all",
        values=known["value"].to_numpy(dtype=float),
        trials=frozenset(rows["trial"]),
        failed=int((rows["status"] == "failed").sum()),
        never=int((~known["reached"]).sum()),
    )


def _problem(arms: list[Arm]) -> str:
    """Why nothing can be decided from these arms; empty where it can."""
    if len(arms) < 2:
        return "there is nothing to compare with"
    few = [arm.name for arm in arms if len(arm.values) < FEWEST]
    if few:
        return f"fewer than {FEWEST} trials of {' and of '.join(few)}"
    if not all(np.isfinite(arm.values).all() for arm in arms):
        return "not all values are finite"
    if all(arm.never == len(arm.values) for arm in arms):
        return "no trial got to the level"
    if sum(len(arm.trials) for arm in arms) > len(frozenset().union(*(a.trials for a in arms))):
        return "the same trial is in two arms"
    return ""


def _reversal(claim: Claim, arms: list[Arm]) -> str:
    """The first step along the axis that goes the other way; empty where none does."""
    if claim.test not in ("rising", "falling"):
        return ""
    for more, less in pairwise(arms):
        step = interval(more.values, less.values)
        if step.high < -abs(claim.margin):
            return f"{less.name} is over {more.name} by {_ends(-step.high, -step.low)}"
    return ""


def _verdict(claim: Claim, found: Interval) -> str:
    if claim.test == "similar":
        if -claim.margin <= found.low and found.high <= claim.margin:
            return HOLDS
        outside = found.low > claim.margin or found.high < -claim.margin
        return FAILS if outside else UNDECIDED
    if found.low > claim.margin:
        return HOLDS
    return FAILS if found.high <= claim.margin else UNDECIDED


def _support(claim: Claim, ends: list[float] | None) -> float:
    """How far within what the claim asks the interval is; less is weaker."""
    if ends is None:
        return -np.inf
    if claim.test == "similar":
        return claim.margin - max(abs(end) for end in ends)
    return ends[0] - claim.margin


def _ends(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"


def _at(claim: Claim, test: Result) -> str:
    return f"{claim.each} {test['at']}: " if claim.each else ""


def _wording(study: Study, claim: Claim) -> str:
    """The test as one readable line."""
    what = {
        "final": f"{claim.metric}, final",
        "mean": f"{claim.metric}, mean of the run",
        "best": f"{claim.metric}, best",
        **until(claim.metric, claim.level),
    }[claim.take]
    margin = number(claim.margin)
    names = [
        ", ".join(f"{axis} {label}" for axis, label in own.items()) or "all"
        for own in _arms(study, claim, claim.where)
    ] or [claim.along]
    first, last = (names[-1], names[0]) if claim.test == "rising" else (names[0], names[-1])
    if claim.test == "similar":
        said = f"|{first} − {last}| ≤ {margin}"
    else:
        said = f"{first} − {last} > {margin}"
    if claim.along:
        said += f", {claim.test} along {claim.along}"
    where = ", ".join(f"{axis} {label}" for axis, label in claim.where.items())
    said += f", where {where}" if where else ""
    return f"{what}: {said}" + (f", at each {claim.each}" if claim.each else "")

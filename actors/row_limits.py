"""What becomes of rows over the length limits, and the account of all rows that were read."""

from dataclasses import asdict, dataclass, field

import numpy as np

from actors.preference_rows import OfflineGroup, TiedError
from actors.tables import DataError
from configs.choices import OverLength


@dataclass
class RowCounts:
    """The rows of one data set: rows = kept + dropped + tied."""

    rows: int = 0
    kept: int = 0
    dropped: int = 0  # over a length limit
    tied: int = 0  # prefer none of their responses
    cut_prompts: int = 0
    cut_responses: int = 0
    duplicate_prompts: int = 0  # kept rows whose prompt came before
    _seen: set[int] = field(default_factory=set, repr=False)

    def keep(self, prompt_ids: np.ndarray) -> None:
        """Count a row that is used."""
        self.kept += 1
        key = hash(prompt_ids.tobytes())
        self.duplicate_prompts += key in self._seen
        self._seen.add(key)

    def record(self) -> dict[str, int]:
        """The counts as plain data."""
        counts = asdict(self)
        del counts["_seen"]
        return counts

    def notes(self, path: str) -> list[str]:
        """A line for each count that a person should hear of."""
        said = (
            (self.dropped, "over a length limit were dropped"),
            (self.cut_prompts, "had their prompt cut"),
            (self.cut_responses, "had a response cut"),
            (self.tied, "prefer none of their responses and were dropped"),
            (self.duplicate_prompts, "repeat a prompt"),
        )
        return [f"{path}: {n} of {self.rows} rows {what}" for n, what in said if n]


def fit_prompt(
    where: str, ids: np.ndarray, limit: int | None, policy: OverLength, counts: RowCounts, key: str
) -> np.ndarray | None:
    """The prompt as it may be used, int32 [P]: cut keeps its end; None where it is dropped.

    key: the setting that holds the policy. Raises DataError with `refuse`.
    """
    if limit is None or len(ids) <= limit:
        return ids
    if policy is OverLength.cut:
        counts.cut_prompts += 1
        return ids[-limit:]
    if policy is OverLength.drop:
        counts.dropped += 1
        return None
    raise DataError(
        f"{where}: prompt of {len(ids)} tokens is over the limit of {limit}; set {key}=drop or cut"
    )


def fit_group(
    where: str, group: OfflineGroup, max_prompt: int | None, max_response: int | None,
    policy: OverLength, counts: RowCounts,
) -> OfflineGroup | None:  # fmt: skip
    """The group as it may be used: cut keeps the beginning of a response, without an end token.

    None where it is dropped. Raises DataError with `refuse`, TiedError where two responses are cut
    to the same.
    """
    key = "data.over_length"
    longest = max(map(len, group.responses))
    if max_response is not None and longest > max_response:
        if policy is OverLength.refuse:
            raise DataError(
                f"{where}: response of {longest} tokens is over the limit of {max_response}; "
                f"set {key}=drop or cut"
            )
        if policy is OverLength.drop:
            counts.dropped += 1
            return None
    prompt = fit_prompt(where, group.prompt_ids, max_prompt, policy, counts, key)
    if prompt is None:
        return None
    if max_response is None or longest <= max_response:
        return group if prompt is group.prompt_ids else _with(group, prompt, longest)
    group = _with(group, prompt, max_response)
    if len(group.responses) == 2 and np.array_equal(*group.responses):
        raise TiedError(f"{where}: its two responses are equal, cut to {max_response} tokens")
    counts.cut_responses += 1
    return group


def _with(group: OfflineGroup, prompt: np.ndarray, tokens: int) -> OfflineGroup:
    logps = None if group.logps is None else tuple(logp[:tokens] for logp in group.logps)
    responses = tuple(ids[:tokens] for ids in group.responses)
    return OfflineGroup(prompt, responses, group.rewards_C, group.labels_C, logps)

"""`python -m cluster advise`: which family of methods the paper's Figure 1 has for one's problem.

Samples π_ref in this process with the torch engine, whatever the preset's, scores its responses and
the data's, and has `cluster.advise.conditions` judge. Settings of its own: samples=2000 (of π_ref),
upper= and lower= (the greatest and least reward possible; known for reward.kind=peak). Where a
preset has a gold reward, that is what responses are scored with; where it trains a reward model on
preferences and names no other data, those preferences are the data.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from actors.actor import score
from actors.engine import Request
from actors.preferences import OfflineGroup, read, to_rollouts
from actors.prompts import Prompt
from actors.rollout import VALID, GroupId, Rollouts, Version, concatenate
from actors.torch_engine import TorchEngine
from cluster import inputs
from cluster.advise import advice
from cluster.advise.conditions import MOST_SAMPLES, Groups, measure_coverage, measure_peak
from cluster.reference import reference_weights
from cluster.stages import pipeline
from configs.choices import RewardKind
from configs.errors import ConfigError
from configs.load import prepare, preset_name
from configs.schema import Config
from learner.batch import conditionals, pad, token_logps
from reward_server import rewards

FOR_DATA = "offline_ipo"  # the preset that a data set alone is read with
EACH = 128  # responses to a prompt at least; where samples are fewer, prompts are
ROWS = 256  # responses that the network takes at once
RANGE: dict[RewardKind, tuple[float, float]] = {RewardKind.peak: (0.0, 1.0)}


@dataclass
class Problem:
    """What was asked, read and checked; nothing is sampled yet."""

    name: str
    given: advice.Given
    config: Config
    reward: rewards.InProcess
    prompts: list[Prompt]
    data: list[OfflineGroup]
    samples: int
    lower: float | None
    upper: float | None


@dataclass
class Samples:
    """π_ref's responses and the data's: an array for each prompt, and for each row of data."""

    rewards: Groups
    logps: Groups  # means over a response's tokens under π_ref, nats per token
    data_logps: Groups
    failed: int  # responses without a reward
    why: str  # of the first of them


def main(source: str, settings: list[str]) -> int:
    """Print the page and write advice.json. ConfigError or ValueError for bad input."""
    start = time.monotonic()
    problem = open_problem(source, settings)
    folder = _folder(problem)
    drawn = sample(problem)
    _refuse(problem, drawn)
    seed = problem.config.seed
    peak = measure_peak(drawn.rewards, problem.lower, problem.upper, seed)
    coverage = measure_coverage(drawn.logps, drawn.data_logps, seed) if problem.data else None
    advised = advice.advise(peak, coverage, problem.given)
    title = _title(" ".join([source, *settings]), problem, drawn, time.monotonic() - start)
    print("\n".join(advice.page(title, peak, coverage, advised)))
    record = {"problem": title, "seed": seed} | advice.record(peak, coverage, advised)
    (folder / "advice.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"every figure: {folder}/advice.json")
    return 0


def open_problem(source: str, settings: Sequence[str]) -> Problem:
    """Read and check everything. source: a preset, or a data set's file."""
    samples, lower, upper, rest = _own_settings(settings)
    preset, is_data = source, Path(source).suffix in {".jsonl", ".parquet"}
    if is_data:
        preset, rest = FOR_DATA, [f"data.path={source}", *rest]
    config = _with_stages(prepare(preset, rest))
    judged_by = config.reward if config.gold.kind is RewardKind.none else config.gold
    reward, data = rewards.InProcess(judged_by), []
    if config.data.path:
        vocabulary, longest = inputs.limits(config)
        data = read(
            config.data.path, None, vocabulary, longest, config.rollout.max_tokens,
            inputs.text_encoder(config), config.data,
        )  # fmt: skip
    asked = _spaced(_prompts(config, data), max(1, samples // EACH))
    least, greatest = RANGE.get(judged_by.kind, (None, None))
    lower, upper = least if lower is None else lower, greatest if upper is None else upper
    if lower is not None and upper is not None and lower >= upper:
        raise ConfigError("lower", lower, f"is not below upper={upper:g}", "set a lower one")
    name = config.run.name or (Path(source).stem if is_data else preset_name(source))
    members = len(data[0].responses) if data else 0
    kept = _spaced(data, max(1, samples // members)) if data else []
    given = advice.Given(preset, rest, config, members)
    return Problem(name, given, config, reward, asked, kept, samples, lower, upper)


def _with_stages(config: Config) -> Config:
    """The settings with the directories of earlier stages filled in, and with the preferences that
    a reward model is trained on as data. ConfigError where the policy's stages were not run."""
    for name in ("data", "sft"):
        directory = pipeline.directories(config)[name]
        if directory and not directory.exists():
            fix = "run `python -m cluster pipeline` with this preset first"
            raise ConfigError(f"pipeline.{name}", directory, "this stage was not run yet", fix)
    if not config.data.path and config.pipeline.reward_model:
        config = replace(config, data=replace(config.data, path=config.reward_model.path))
    return pipeline.named(config)


def _own_settings(
    settings: Sequence[str],
) -> tuple[int, float | None, float | None, list[str]]:
    """samples, lower, upper, and the settings that are the run's."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for text in settings:
        key, equals, value = text.partition("=")
        if equals and key in ("samples", "lower", "upper"):
            own[key] = value
        else:
            rest.append(text)
    asked = own.get("samples", "2000")
    if not (asked.isascii() and asked.isdigit() and 2 <= int(asked[:9]) <= MOST_SAMPLES):
        fix = f"set samples to 2 … {MOST_SAMPLES:,}, as 2000"
        raise ConfigError("samples", asked, "not a number of responses to sample", fix)
    return int(asked), _number("lower", own), _number("upper", own), rest


def _number(key: str, own: dict[str, str]) -> float | None:
    if key not in own:
        return None
    try:
        value = float(own[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(key, own[key], "is no finite number", f"set {key} to a reward")
    return value


def _prompts(config: Config, data: list[OfflineGroup]) -> list[Prompt]:
    """The data's prompts, each once, or the settings'."""
    if data:
        ids = {group.prompt_ids.tobytes(): group.prompt_ids for group in data}
        return [Prompt(prompt, row) for row, prompt in enumerate(ids.values())]
    stream = inputs.prompts(config)
    return [stream[position] for position in range(stream.rows)]


def _spaced(rows: list, most: int) -> list:  # type: ignore[type-arg]
    """At most so many of the rows, evenly spaced."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _title(asked: str, problem: Problem, drawn: Samples, seconds: float) -> str:
    count, prompts = sum(map(len, drawn.rewards)), len(drawn.rewards)
    failed = f", {drawn.failed:,} more without a reward" if drawn.failed else ""
    reward = problem.reward.identity
    to = f"{prompts} prompt{'s' if prompts > 1 else ''}"
    return (
        f"{asked}: {count:,} responses of π_ref to {to}{failed}, reward {reward}, {seconds:.1f} s"
    )


def _folder(problem: Problem) -> Path:
    folder = Path(problem.config.run.dir) / "advice" / problem.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem_ = f"cannot be written to: {error.strerror}"
        raise ConfigError("run.dir", folder, problem_, "set run.dir to another folder") from error
    return folder


def sample(problem: Problem) -> Samples:
    """Responses of π_ref to each prompt, scored; and the data's likelihood under π_ref."""
    config, count = problem.config, len(problem.prompts)
    each = max(2, problem.samples // count)
    times = -(-each // 64)  # groups of each prompt
    config = replace(config, rollout=replace(config.rollout, responses_per_prompt=each // times))
    engine = TorchEngine(config)
    engine.load(reference_weights(config), Version(0, 0))
    requests = [
        Request(GroupId(position, 0), problem.prompts[position % count])
        for position in range(times * count)
    ]
    step = max(1, ROWS // config.rollout.responses_per_prompt)
    parts = [requests[i : i + step] for i in range(0, len(requests), step)]
    block = concatenate([engine.generate(part, "advise") for part in parts])
    score(block, problem.reward, 0.0)
    owner_N = np.repeat(block.position_G % count, block.members)
    valid_N, logp_N = block.status_N == VALID, _mean_logps(block)
    picks = [np.flatnonzero(valid_N & (owner_N == prompt)) for prompt in range(count)]
    picks = [pick for pick in picks if len(pick) >= 2]
    return Samples(
        [block.reward_N[pick].astype(np.float64) for pick in picks],
        [logp_N[pick] for pick in picks],
        _data_logps(engine, problem.data, config.rollout.temperature),
        int((~valid_N).sum()),
        next(iter(block.failures.values()), ""),
    )


def _mean_logps(block: Rollouts) -> np.ndarray:
    """Each response's log-likelihood per token, [N] float64, NaN where it has none."""
    total_N1 = np.concatenate([[0.0], np.cumsum(block.logp_K, dtype=np.float64)])
    sum_N = np.diff(total_N1[block.offset_N1])
    return np.where(block.length_N > 0, sum_N / np.maximum(1, block.length_N), np.nan)


@torch.inference_mode()
def _data_logps(engine: TorchEngine, data: list[OfflineGroup], temperature: float) -> Groups:
    """The data's log-likelihoods per token under the engine's weights, an array for each row."""
    groups: Groups = []
    step = max(1, ROWS // len(data[0].responses)) if data else 1
    for start in range(0, len(data), step):
        rows = range(start, min(start + step, len(data)))
        part = [data[row] for row in rows]
        block = to_rollouts(part, rows, [0] * len(rows), rows, temperature)
        batch = pad(block, engine.device)
        logp_NL = token_logps(conditionals(engine.model, batch), batch)
        mean_N = logp_NL.double().sum(1).cpu().numpy() / block.length_N
        groups += list(mean_N.reshape(len(part), block.members))
    return groups


def _refuse(problem: Problem, drawn: Samples) -> None:
    """ValueError where rewards failed too often, or lie outside of the range given."""
    total = drawn.failed + sum(map(len, drawn.rewards))
    if not drawn.rewards or drawn.failed > problem.config.limits.failure_rate * total:
        raise ValueError(f"{drawn.failed} of {total} responses have no reward: {drawn.why}")
    rewards_ = np.concatenate(drawn.rewards)
    for key, bound, seen in (
        ("lower", problem.lower, rewards_.min()),
        ("upper", problem.upper, rewards_.max()),
    ):
        beyond = 0.0 if bound is None else (seen - bound) * (1 if key == "upper" else -1)
        if beyond > 1e-6:
            fix = f"set {key} to the end of the reward's range, or leave it out"
            raise ConfigError(key, bound, f"a response of π_ref has reward {seen:.4g}", fix)

"""What a change of weights costs, beside cloning them; and what rollout actors generate.

An update is measured from the moment the learner begins to read out its weights until the engine
may generate again, over the way of a run: read-out, Ray's object store, the actor's process, the
engine. Beside it, in turns, the same weights are cloned into fresh memory in the learner's process.
vLLM is also updated while it generates: each token's version shows that it was, and the stall is
what its scheduler stood still. Two actors take the same version at once. Generation is without
queue and reward service.

Settings of its own: sizes=1M,25M,260M engines=torch,vllm repeats=5 actors=1,2,4 seconds=5 (of
generation for each number of actors; 0 leaves it out); all others are those of a run.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ray

from benchmarks.outside import split
from benchmarks.weights_table import generation_table, update_table
from benchmarks.weights_updates import ALLOWANCE, LIMITS, end, start, updates
from cluster import connection
from cluster.run_directory import describe_environment
from configs.errors import ConfigError
from configs.load import prepare
from configs.schema import Config

TARGET = Path("runs/bench/weights.json")
HEAD, VOCABULARY = 64, 256  # vLLM's CPU attention knows heads of 64
KV_CACHE_GIB = 0.5


class Size(NamedTuple):
    """A GPT-2 of width 64·heads; prompts and tokens of one lease keep it busy for a while."""

    layers: int
    heads: int
    prompts: int
    tokens: int


SIZES = {"1M": Size(5, 2, 10, 128), "25M": Size(8, 8, 4, 64), "260M": Size(21, 16, 1, 32)}


class Settings(NamedTuple):
    """The bench's own settings."""

    sizes: tuple[str, ...] = tuple(SIZES)
    engines: tuple[str, ...] = tuple(LIMITS)
    repeats: int = 5
    actors: tuple[int, ...] = (1, 2, 4)
    seconds: float = 5.0


def parse(overrides: list[str]) -> tuple[Settings, list[str]]:
    """The bench's own settings, and the rest. ConfigError for a value that cannot be used."""
    given, rest = split(overrides, Settings._fields)
    own: dict[str, Any] = {}
    for key, value in given.items():
        try:
            own[key] = _value(key, value)
        except ValueError:
            known = {"sizes": ",".join(SIZES), "engines": ",".join(LIMITS), "actors": "1,2,4"}
            fix = f"set {key}={known.get(key, getattr(Settings(), key))}"
            raise ConfigError(key, value, "cannot be used", fix) from None
    return Settings(**own), rest


def _value(key: str, value: str) -> Any:
    """A setting's value; ValueError where it is none."""
    if key in ("sizes", "engines"):
        names, known = tuple(value.split(",")), SIZES if key == "sizes" else LIMITS
        if not set(names) <= set(known):
            raise ValueError
        return names
    if key == "actors":
        counts = tuple(sorted({int(count) for count in value.split(",")}))
        if counts[0] < 1:
            raise ValueError
        return counts
    number = int(value) if key == "repeats" else float(value)
    if number < (1 if key == "repeats" else 0):
        raise ValueError
    return number


def configured(name: str, engine: str, overrides: list[str]) -> Config:
    """A run's settings for a size and an engine."""
    size = SIZES[name]
    shape = {"vocabulary": VOCABULARY, "layers": size.layers, "heads": size.heads,
             "width": HEAD * size.heads}  # fmt: skip
    return prepare("bandit_vllm", [
        f"rollout.engine={engine}", f"rollout.max_tokens={size.tokens}",
        f"rollout.vllm.kv_cache_gib={KV_CACHE_GIB}",
        *(f"policy.bandit.{key}={value}" for key, value in shape.items()), *overrides,
    ])  # fmt: skip


def main(overrides: list[str]) -> None:
    """Print what updates cost and what actors generate, as tables; write both as JSON."""
    settings, rest = parse(overrides)
    pairs = [(size, engine) for size in settings.sizes for engine in settings.engines]
    configs = {pair: configured(*pair, rest) for pair in pairs}
    out: dict[str, Any] = {
        "environment": describe_environment(), "settings": settings._asdict(), "overrides": rest,
        "allowance_ms": 1e3 * ALLOWANCE, "updates": [], "generation": [],
    }  # fmt: skip
    with connection.connected(configs[pairs[0]].cluster):
        for (size, engine), config in configs.items():
            prompts = SIZES[size].prompts
            out["updates"] += updates(size, engine, config, settings.repeats, prompts)
        for engine in settings.engines if settings.seconds else ():
            size = settings.sizes[0]
            out["generation"] += generation(size, engine, configs[size, engine], settings)
    print(update_table(out["updates"]))
    if out["generation"]:
        print(generation_table(out["generation"]))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")


def generation(
    size: str, engine: str, config: Config, settings: Settings
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the generation table. Actors start one after another, as many as the next row asks
    for, so each pays its start once and no idle one is in the way. Their weights are those that
    the engine began with: what they are makes no difference to the time."""
    rows: list[dict[str, Any]] = []
    fleet: list[Any] = []
    starts: list[float] = []
    try:
        for actors in settings.actors:
            while len(fleet) < actors:
                what = f"{size}: {engine} actor {len(fleet)}"
                actor, seconds = start("Receiver", config, what)
                fleet.append(actor)
                starts.append(seconds)
                ray.get(actor.call.remote("take_own"))
                ray.get(actor.call.remote("generate", SIZES[size].prompts))  # warm-up
            row = _generate(size, engine, fleet, settings.seconds)
            rows.append({**row, "start_seconds": starts[:actors]})
    finally:
        for actor in fleet:
            end(actor)
    return rows


def _generate(size: str, engine: str, fleet: list[Any], seconds: float) -> dict[str, Any]:
    """One row: what these actors make together."""
    prompts = SIZES[size].prompts
    print(f"{size}: {engine}, {len(fleet)} actor(s) generate for {seconds:g} s", flush=True)
    made = ray.get([actor.call.remote("generate_for", seconds, prompts) for actor in fleet])
    rates = {
        f"{name}_per_s": sum(m[name] / m["seconds"] for m in made)
        for name in ("rollouts", "tokens")
    }
    return {"size": size, "engine": engine, "actors": len(fleet), **rates}

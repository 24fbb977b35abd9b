"""Rules on the parts around the algorithm: engines, prompts, data, the run's name.

Each rule raises ConfigError with a concrete fix.
"""

import re

from configs import faults
from configs.bounds import Rule, near, set_to
from configs.choices import (
    TRACKERS,
    DataSource,
    EngineKind,
    PromptKind,
    Schedule,
    UpdateKind,
)
from configs.errors import ConfigError, shown
from configs.schema import Config

# vllm 0.32.0, v1/attention/backends/cpu_attn.py
VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}")


def data_path_is_used(config: Config) -> None:
    """A data file is set only where it is read."""
    path = config.data.path
    if path and config.data.source is not DataSource.offline:
        fix = "set data.source=offline, or data.path= to leave it out"
        raise ConfigError("data.path", path, "is read with data.source=offline only", fix)


def in_flight_updates_can_happen(config: Config) -> None:
    """Updates in mid-generation need vLLM and pipelined rounds."""
    update, key = config.rollout.update, "rollout.update"
    if update is not UpdateKind.in_flight:
        return
    if config.rollout.engine is not EngineKind.vllm:
        fix = "set rollout.engine=vllm or rollout.update=between_requests"
        raise ConfigError(key, update, "only vllm changes weights in mid-generation", fix)
    if config.replay.schedule is not Schedule.pipelined:
        fix = "set replay.schedule=pipelined or rollout.update=between_requests"
        raise ConfigError(key, update, "lockstep has no updates during generation", fix)


def heads_divide_the_width(config: Config) -> None:
    """The bandit network's heads share its width equally."""
    bandit = config.policy.bandit
    if not config.policy.path and bandit.width % bandit.heads:
        key = "policy.bandit.width"
        problem = f"must be a multiple of policy.bandit.heads={bandit.heads}"
        raise ConfigError(key, bandit.width, problem, set_to(key, near(bandit.width, bandit.heads)))


def vllm_knows_the_head_size(config: Config) -> None:
    """vLLM on CPU has attention for the bandit network's head size."""
    bandit, gpu = config.policy.bandit, config.cluster.actor_gpus > 0
    if config.policy.path or gpu or config.rollout.engine is not EngineKind.vllm:
        return
    size = bandit.width // bandit.heads
    if size not in VLLM_CPU_HEADS:
        known = ", ".join(map(str, VLLM_CPU_HEADS))
        problem = f"head size {size}, and vLLM's CPU attention knows {known}"
        fix = "set policy.bandit.width=64 policy.bandit.heads=2, or rollout.engine=torch"
        raise ConfigError("policy.bandit.width", bandit.width, problem, fix)


def prompts_have_a_source(config: Config) -> None:
    """A file source has a path, and the bandit none."""
    prompts = config.prompts
    if prompts.source is PromptKind.bandit:
        if prompts.path:
            fix = "set prompts.source=jsonl, parquet or dataset, or prompts.path= to leave it out"
            raise ConfigError("prompts.path", prompts.path, "is not read by source=bandit", fix)
    elif not prompts.path:
        problem = f"prompts.source={prompts.source.name} reads a file or data set"
        raise ConfigError("prompts.path", "", problem, "set prompts.path to it")


def bandit_contexts_are_tokens(config: Config) -> None:
    """Bandit contexts are tokens of the bandit's own network."""
    prompts, vocabulary = config.prompts, config.policy.bandit.vocabulary
    if prompts.source is not PromptKind.bandit:
        return
    if config.policy.path:
        problem = f"bandit contexts are for the bandit's network, not {config.policy.path}"
        fix = "set prompts.source=jsonl, parquet or dataset, or policy.path= for the bandit"
        raise ConfigError("prompts.source", prompts.source, problem, fix)
    if not 1 <= prompts.count <= vocabulary:
        problem = f"each context is one token of policy.bandit.vocabulary={vocabulary}"
        fix = f"set prompts.count from 1 to {vocabulary}"
        raise ConfigError("prompts.count", prompts.count, problem, fix)


def faults_are_known(config: Config) -> None:
    """`cluster.faults` names points and kinds that there are."""
    try:
        faults.parse(config.cluster.faults)
    except ValueError as error:
        fix = f"kinds are {', '.join(faults.KINDS)}; points are in configs/faults.py"
        raise ConfigError("cluster.faults", config.cluster.faults, str(error), fix) from error


def metrics_are_no_faster_than_rays(config: Config) -> None:
    """Ray reports at most once a second; what is exported more often goes unseen."""
    key, seconds = "cluster.metrics_seconds", config.cluster.metrics_seconds
    if 0 < seconds < 1:
        raise ConfigError(key, seconds, "Ray reports once a second", f"set {key}=1, or 0 for none")


def run_name_is_a_file_name(config: Config) -> None:
    """A run's name is safe as a directory of `run.dir`."""
    name = config.run.name
    if name and not _FILE_NAME.fullmatch(name):
        plain = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", name).lstrip(".+=-")[:100] or "try"
        problem = "must be a plain file name of letters, digits and _ . + = -"
        raise ConfigError("run.name", name, problem, f"set run.name={plain}")


def run_dir_is_a_path(config: Config) -> None:
    """A run renames, locks and appends to files, which object storage does not have."""
    folder = config.run.dir
    if "://" in folder:
        problem = "is no path: a run renames, locks and appends to its files"
        fix = f"set run.dir to a folder that all nodes share, and run.mirror={shown(folder, 60)}"
        raise ConfigError("run.dir", folder, problem, fix)


def mirror_is_an_address(config: Config) -> None:
    """`run.mirror` is a URL without secrets, since settings are written down."""
    url = config.run.mirror
    if url and "://" not in url:
        problem, fix = "is no URL", f"set run.mirror=file://{url}"
    elif "?" in url or ":" in url.partition("://")[2].partition("/")[0].rpartition("@")[0]:
        problem, fix = "may hold a secret", "give that to the storage's package by other means"
        url = url.partition("://")[0] + "://…"
    else:
        return
    raise ConfigError("run.mirror", url, problem, fix)


def trackers_are_known(config: Config) -> None:
    """`run.trackers` names trackers that there are, each once."""
    names, known = config.run.trackers, ", ".join(TRACKERS)
    if unknown := [name for name in names if name not in TRACKERS]:
        problem = f"{shown(unknown[0], 40)} is none that is known"
        raise ConfigError("run.trackers", names, problem, f"take of {known}")
    if len(set(names)) < len(names):
        fix = f"set run.trackers={','.join(dict.fromkeys(names))}"
        raise ConfigError("run.trackers", names, "names one twice", fix)


SYSTEM_RULES: tuple[Rule, ...] = (
    data_path_is_used,
    in_flight_updates_can_happen,
    heads_divide_the_width,
    vllm_knows_the_head_size,
    prompts_have_a_source,
    bandit_contexts_are_tokens,
    run_name_is_a_file_name,
    metrics_are_no_faster_than_rays,
    run_dir_is_a_path,
    mirror_is_an_address,
    faults_are_known,
    trackers_are_known,
)

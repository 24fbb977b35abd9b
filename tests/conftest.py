"""One Ray cluster and one vLLM engine of our own for all integration tests; who runs what.

`python -m pytest` runs in two processes: first they share out the files of unit tests, then one of
them runs everything else, a test at a time, since one run's processes have use for all cores.
Where files or folders are named, or with `-n 0`, it is one process.
"""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

WORKERS = 2


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that run tests; 0: this one alone."""
    return WORKERS if config.args_source is config.ArgsSource.TESTPATHS else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return UnitTestsFirst(config, log)


class UnitTestsFirst(LoadFileScheduling):
    """Hands out a file of unit tests at a time; what is left, in the order of `testpaths`, goes to
    one process as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return file if file.startswith("tests/unit/") else "whole machine"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs and no dashboard."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def crew(ray_cluster: None) -> Iterator[Any]:
    """Processes that runs one after another share, as a study's do: a run whose start-up is not
    what is tested need not wait for torch and DeepSpeed. No report is drawn."""
    from cluster.crew import Crew

    kept = Crew(keep=True)
    yield kept
    kept.end()


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory) -> list[str]:
    """Overrides of the preset bandit_vllm: a model directory with context 160, far from uniform,
    and ten prompts of one token in a file."""
    import torch

    from actors import policy
    from configs.schema import BanditPolicyConfig

    folder = tmp_path_factory.mktemp("policy")
    torch.set_num_threads(1)  # two compete with vLLM's processes for the cores
    torch.manual_seed(0)
    shape = policy.bandit_architecture(BanditPolicyConfig(width=64, heads=2, layers=2), 159)
    model = policy.build(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder / "hf")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [n]}) + "\n" for n in range(10)))
    return [f"policy.path={folder / 'hf'}", "prompts.source=jsonl", f"prompts.path={prompts}"]


@pytest.fixture(scope="session")
def vllm_engine(small_policy: list[str]) -> Iterator[Any]:
    """A started vLLM engine of `small_policy`; about 25 s, so once for all tests."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from actors.vllm_engine import VllmEngine
    from configs.load import prepare

    engine = VllmEngine(prepare("bandit_vllm", small_policy))
    yield engine
    engine.close()

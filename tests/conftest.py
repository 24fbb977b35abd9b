"""One Ray cluster and one vLLM engine of our own for all integration tests."""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from actors import policy
from configs.load import prepare
from configs.schema import BanditPolicyConfig


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs and no dashboard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory) -> list[str]:
    """Overrides of the preset bandit_vllm: a model directory with context 160, far from uniform,
    and ten prompts of one token in a file."""
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

    engine = VllmEngine(prepare("bandit_vllm", small_policy))
    yield engine
    engine.close()

"""What keeps real vLLM from starting comes back as one line. Each case starts vLLM anew."""

import importlib.util

import pytest
from transformers import OpenAIGPTConfig

from actors import policy
from configs.load import prepare


@pytest.fixture
def strange_policy(tmp_path) -> list[str]:
    """Overrides for a network that vLLM has no implementation of."""
    shape = OpenAIGPTConfig(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=1)
    policy.write_architecture(shape, str(tmp_path))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1]}\n')
    return [f"policy.path={tmp_path}", "prompts.source=jsonl", f"prompts.path={prompts}"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("cache_gib", "why", "fix"),
    [
        (0.00005, "one request with the model's max seq len", "set a higher rollout.vllm.kv_cac"),
        (10_000, "less than requested memory for kv (10000.0 GiB)", "set a lower rollout.vllm.k"),
        (0.25, "['OpenAIGPTLMHeadModel'] are not supported", "set rollout.engine=torch"),
    ],
)
def test_what_vllm_refuses_is_one_line(request, cache_gib, why, fix):
    from actors.vllm_engine import VllmEngine

    strange = request.getfixturevalue("strange_policy") if "OpenAI" in why else []
    config = prepare("bandit_vllm", [f"rollout.vllm.kv_cache_gib={cache_gib}", *strange])
    with pytest.raises(ValueError, match="rollout.engine=vllm cannot serve this policy: ") as end:
        VllmEngine(config)
    line = str(end.value)
    assert why in line and fix in line and "\n" not in line and "root cause" not in line

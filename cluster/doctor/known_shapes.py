"""Architectures of the networks that the full-scale presets name, so that a dry run needs no hub.

The fields are those of each network's public config.json; parameters are counted from the network
that transformers builds of them, without its weights.
"""

from typing import Any

from transformers import AutoConfig, GPTNeoXConfig, MistralConfig, PretrainedConfig

from configs.errors import ConfigError

_PYTHIA: dict[str, Any] = {"vocab_size": 50_304, "max_position_embeddings": 2048, "eos_token_id": 0}
_KNOWN: dict[str, PretrainedConfig] = {
    "EleutherAI/pythia-410m": GPTNeoXConfig(
        **_PYTHIA, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16,
    ),
    "EleutherAI/pythia-1.4b": GPTNeoXConfig(
        **_PYTHIA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
        num_attention_heads=16,
    ),
    "mistralai/Mistral-7B-v0.1": MistralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32_768,
        sliding_window=4096, eos_token_id=2,
    ),
}  # fmt: skip
_SAME = {
    "EleutherAI/pythia-410m-deduped": "EleutherAI/pythia-410m",
    "EleutherAI/pythia-1.4b-deduped": "EleutherAI/pythia-1.4b",
    "HuggingFaceH4/mistral-7b-sft-beta": "mistralai/Mistral-7B-v0.1",
}


def shape(key: str, path: str, revision: str = "") -> PretrainedConfig:
    """The architecture of a model directory or hub name. ConfigError, which names `key`, where it
    is neither known nor to be read."""
    if found := _KNOWN.get(_SAME.get(path, path)):
        return found
    try:
        return AutoConfig.from_pretrained(path, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(key, path, f"cannot be read: {line}", "name a model directory") from error

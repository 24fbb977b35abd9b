"""Reward models to test with: tiny sequence classifiers with random weights, far from zero."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

VOCABULARY, CONTEXT = 100, 64
_SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=2, max_position_embeddings=CONTEXT, num_labels=1,
              eos_token_id=0, pad_token_id=0)  # fmt: skip


def shape(family: str, **changes: int) -> PretrainedConfig:
    """GPT-NeoX or Llama, 0.03M parameters; the end token pads too, as it often does."""
    kind = GPTNeoXConfig if family == "gpt_neox" else LlamaConfig
    return kind(**(_SIZES | changes))


def save_model(folder: Path, family: str = "gpt_neox", seed: int = 0, **changes: int) -> Path:
    """A reward model's directory."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(shape(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, *words: str) -> Path:
    """A tokenizer of words, numbered from 0; the first ends responses."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Change entries of a directory's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

"""A small language model with words for tokens, and data for it: what tests of stages share."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from configs.load import prepare
from configs.schema import Config

WORDS = ["<end>", "<pad>", "<unk>", *"abcdefghijklm"]
END, PAD, FIRST = 0, 1, 3  # ids; `FIRST` is that of "a"


def model_directory(folder: Path, tokenizer: bool = True, pad: str | None = "<pad>") -> str:
    """A GPT-NeoX of 2 layers and width 32, context 24, with a word-level tokenizer."""
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=24, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    if tokenizer:
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<end>", unk_token="<unk>", pad_token=pad
        ).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_rows(count: int) -> list[dict[str, Any]]:
    """Prompts of two words, each answered by its first word, once to five times."""
    letters = "abcdefghijklm"
    return [
        {"prompt": f"{letters[n % 13]} {letters[n // 13 % 13]}",
         "response": " ".join(letters[n % 13] * (1 + n % 5))}
        for n in range(count)
    ]  # fmt: skip


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Of two responses to a prompt, the shorter one is preferred."""
    return [
        {"prompt_ids": [FIRST + n % 13, FIRST + n // 13 % 13],
         "chosen_ids": [FIRST + n % 7] * (1 + n % 3) + [END],
         "rejected_ids": [FIRST + n % 5] * (5 + n % 4) + [END]}
        for n in range(count)
    ]  # fmt: skip


def config_of(kind: str, base: str, path: str, *overrides: str) -> Config:
    """Settings of a stage on rows and a model of its own."""
    own = [f"{kind}.model={base}", f"{kind}.path={path}", f"{kind}.minibatch=8", f"{kind}.lr=1e-2"]
    return prepare("bandit", [*own, *overrides])

"""The length problems' starting network: a tiny Pythia with a tokenizer of whole words."""

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from configs.schema_length import LengthDataConfig
from learner.stages.length_words import vocabulary

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"
SPECIAL = (END, PAD, UNKNOWN)  # tokens 0, 1, 2


def write_model(folder: Path, data: LengthDataConfig, seed: int) -> None:
    """A model directory as transformers and vLLM load it; it appears whole or not at all."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = word_tokenizer(data.context)
    tokenizer.save_pretrained(beside)
    network(data, len(tokenizer), seed).save_pretrained(beside)
    beside.rename(folder)


def word_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """A token for each word between blanks; what is no word of ours is `<unk>`."""
    ids = {word: number for number, word in enumerate([*SPECIAL, *vocabulary()])}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def network(data: LengthDataConfig, vocabulary_size: int, seed: int) -> GPTNeoXForCausalLM:
    """Pythia's shape (GPT-NeoX with parallel residuals), weights drawn from the seed alone."""
    shape = GPTNeoXConfig(
        vocab_size=vocabulary_size,
        hidden_size=data.width,
        num_hidden_layers=data.layers,
        num_attention_heads=data.heads,
        intermediate_size=4 * data.width,
        max_position_embeddings=data.context,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
        use_parallel_residual=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(shape)

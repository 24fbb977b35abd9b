"""Small language models and batches of varying lengths, for tests of the learner."""

import copy
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from actors.rollout import REWARD_FAILED, Rollouts, offsets
from learner.replay.records import Batch, Held, index

VOCABULARY, CONTEXT = 40, 64

_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
SHAPES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ),
    "gpt_neox": GPTNeoXConfig(**_COMMON, hidden_dropout=0.0, attention_dropout=0.0),
    "llama": LlamaConfig(**_COMMON, num_key_value_heads=1),
    "mistral": MistralConfig(**_COMMON, num_key_value_heads=1, sliding_window=8),
}  # fmt: skip


def network(shape: str, attention: str = "sdpa", wide: bool = False) -> PreTrainedModel:
    """A network of random weights, far enough from uniform that attention matters.

    wide: its matrices have over 100,000 numbers; smaller ones DeepSpeed leaves whole under ZeRO-3.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[shape])
    if wide:
        config.update({"hidden_size": 128, "vocab_size": 1000})
        config.update({"n_inner" if shape == "gpt2" else "intermediate_size": 1024})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0 if wide else 4.0)
    return model


def settings_for(folder: Path, shape: str, wide: bool = False) -> list[str]:
    """Overrides that make a preset's policy such a network, saved in the folder."""
    network(shape, wide=wide).save_pretrained(folder / "hf")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1]}\n')
    return [
        f"policy.path={folder / 'hf'}", "prompts.source=jsonl", f"prompts.path={prompts}",
        "rollout.max_tokens=30", "learner.exact_kl=false",
    ]  # fmt: skip


def rollouts(groups: int = 6, members: int = 4, failed: tuple[int, ...] = (5,)) -> Rollouts:
    """A block with prompts of 1 … 9 and responses of 1 … 30 tokens, most of them short.

    failed: rollouts without a reward.
    """
    random = np.random.default_rng(0)
    prompt_G, n = random.integers(1, 10, groups), groups * members
    length_N = np.clip(random.lognormal(np.log(8), 0.7, n).astype(np.int64), 1, 30)
    length_N[0], length_N[1] = 30, 1
    block = Rollouts(
        members=members,
        position_G=np.arange(groups),
        incarnation_G=np.zeros(groups, dtype=np.int32),
        row_G=np.arange(groups),
        prompt_offset_G1=offsets(prompt_G),
        prompt_P=random.integers(0, VOCABULARY, prompt_G.sum()).astype(np.int32),
        offset_N1=offsets(length_N),
        token_K=random.integers(0, VOCABULARY, length_N.sum()).astype(np.int32),
        logp_K=random.uniform(-4, -3, length_N.sum()).astype(np.float32),
        lineage_K=np.zeros(length_N.sum(), dtype=np.int16),
        step_K=np.zeros(length_N.sum(), dtype=np.int32),
        reward_N=random.normal(size=n).astype(np.float32),
        status_N=np.zeros(n, dtype=np.uint8),
        truncated_N=np.zeros(n, dtype=bool),
        label_N=random.integers(0, 2, n).astype(np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
    )
    for rollout in failed:
        block.fail(rollout, REWARD_FAILED, "for the test")
    return block


def batch_of(block: Rollouts, rank: int = 0, ranks: int = 1, number: int = 0) -> Batch:
    """The rank's slice of a minibatch that is this block, at its first use and age 0."""
    each = -(-block.groups // ranks)
    held = [Held.of(block, group) for group in range(block.groups)]
    mine = range(rank * each, min((rank + 1) * each, block.groups))
    return Batch(
        lineage=0,
        number=number,
        step=0,
        round=number,
        first=rank * each * block.members,
        block=block.select(mine.start, mine.stop) if mine else None,
        index=index(held, [np.ones(block.members, dtype=np.int64)] * len(held), 0, False),
        round_rewards=block.reward_N[~np.isnan(block.reward_N)],
        measures={},
        last=False,
    )

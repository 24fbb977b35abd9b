"""The written-out networks give transformers' own logits, padded or not, also with rows let go."""

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedModel

from actors import decoding, policy
from configs.load import prepare

SHAPES = {
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt2-scaled-by-layer": GPT2Config(
        vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None, scale_attn_by_inverse_layer_idx=True, n_inner=40,
    ),
    "neox": GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    ),
    "neox-in-turn": GPTNeoXConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, use_parallel_residual=False,
        attention_bias=False, rotary_pct=1.0,
    ),
}  # fmt: skip
ROWS, PROMPT, MORE = 6, 5, 8


def network(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return policy.build(SHAPES[name]).eval()


def walk(
    batch: decoding.Decoding, mask_NP: torch.Tensor, drop_at: int | None = None
) -> torch.Tensor:
    """Each step's logits of the even rows, [steps, N / 2, V]; the others go at `drop_at`."""
    generator = torch.Generator().manual_seed(1)
    token_NT = torch.randint(0, 50, (ROWS, PROMPT + MORE), generator=generator)
    place_NP = (mask_NP.cumsum(1) - 1).clamp_min(0)
    steps = [batch.logits(token_NT[:, :PROMPT], place_NP)]
    place_N1, rows = mask_NP.sum(1, keepdim=True), torch.arange(ROWS)
    for t in range(PROMPT, PROMPT + MORE - 1):
        if t == drop_at:
            rows = torch.arange(0, ROWS, 2)
            batch.keep(rows)
        steps.append(batch.logits(token_NT[rows, t : t + 1], place_N1[rows]))
        place_N1 = place_N1 + 1
    return torch.stack([step[torch.isin(rows_of(step), even())] for step in steps])


def rows_of(step_NV: torch.Tensor) -> torch.Tensor:
    whole = len(step_NV) == ROWS
    return torch.arange(ROWS) if whole else even()


def even() -> torch.Tensor:
    return torch.arange(0, ROWS, 2)


def unpadded() -> torch.Tensor:
    return torch.ones(ROWS, PROMPT, dtype=torch.long)


def left_padded() -> torch.Tensor:
    mask_NP = unpadded()
    for row in range(ROWS):
        mask_NP[row, : row % PROMPT] = 0
    return mask_NP


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_prompts_of_one_length_give_the_same_logits(name: str) -> None:
    model, mask_NP = network(name), unpadded()
    ours = decoding.start(model, mask_NP, MORE)
    assert not isinstance(ours, decoding.Transformers)
    theirs = walk(decoding.Transformers(model, mask_NP), mask_NP)
    torch.testing.assert_close(walk(ours, mask_NP), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_padding_changes_no_logits(name: str) -> None:
    model, mask_NP = network(name), left_padded()
    ours = walk(decoding.start(model, mask_NP, MORE), mask_NP)
    theirs = walk(decoding.Transformers(model, mask_NP), mask_NP)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_NP", [unpadded(), left_padded()], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_rows_let_go_leave_the_others_as_they_are(name: str, mask_NP: torch.Tensor) -> None:
    model = network(name)
    whole = walk(decoding.Transformers(model, mask_NP), mask_NP)
    for batch in (
        decoding.start(model, mask_NP, MORE),
        decoding.Transformers(model, mask_NP),
    ):
        some = walk(batch, mask_NP, drop_at=PROMPT + 3)
        torch.testing.assert_close(some, whole, rtol=0, atol=1e-5)


def other() -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return policy.build(shape).eval()


@pytest.mark.parametrize("name", [*SHAPES, "llama"])
@torch.inference_mode()
def test_whole_texts_have_the_logits_of_transformers(name: str) -> None:
    model = other() if name == "llama" else network(name)
    token_NT = torch.randint(0, 50, (4, 11), generator=torch.Generator().manual_seed(1))
    theirs = model(token_NT, use_cache=False).logits
    ours = decoding.text_logits(model, token_NT)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_the_bandits_own_network_is_transformers_with_the_same_flat_array() -> None:
    config = prepare("bandit", ["rollout.max_tokens=20"])
    shape = policy.bandit_architecture(config.policy.bandit, 20)
    theirs, ours = policy.build(shape).eval(), policy.to_sample(config)
    policy.unflatten(ours, policy.flatten(theirs))
    laid_out = [(name, p.shape) for name, p in policy.named(theirs)]
    assert [(name, p.shape) for name, p in policy.named(ours)] == laid_out
    assert policy.context_limit(ours.config) == policy.context_limit(shape) == 21
    token_NT = torch.randint(0, 100, (4, 11), generator=torch.Generator().manual_seed(1))
    logits = theirs(token_NT, use_cache=False).logits
    torch.testing.assert_close(ours(token_NT, use_cache=False).logits, logits, rtol=0, atol=1e-6)


def test_other_architectures_go_through_transformers() -> None:
    model = other()
    assert isinstance(decoding.start(model, unpadded(), MORE), decoding.Transformers)

"""SFT and reward models: losses are the references', whatever the batch; stages resume exactly."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.load import prepare
from configs.schema import Config
from learner.engine import join
from learner.stages.plan import deal, open_stage
from learner.stages.reward_model import calibration
from learner.stages.supervised import Supervised
from tests.harness import free_port
from tests.stages import (
    END,
    FIRST,
    PAD,
    config_of,
    model_directory,
    preference_rows,
    sft_rows,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp("base"))


@pytest.fixture
def sft(base, tmp_path):
    """Settings of SFT on 40 rows."""
    path = write_rows(tmp_path / "rows.jsonl", sft_rows(40))
    return lambda *overrides: config_of("sft", base, path, *overrides)


@pytest.fixture
def reward(base, tmp_path):
    """Settings of a reward model on 40 pairs."""
    path = write_rows(tmp_path / "pairs.jsonl", preference_rows(40))
    return lambda *overrides: config_of("reward_model", base, path, *overrides)


def rank(config: Config, kind) -> Supervised:
    join(0, 1, ("127.0.0.1", free_port()), 1)
    return Supervised(config, kind, 0)


def gradients(trained: Supervised) -> np.ndarray:
    module = trained.engine.engine.module
    return np.concatenate([p.grad.numpy().ravel() for p in module.parameters()])


# --- losses ----------------------------------------------------------------------------------


def test_sft_loss_is_the_mean_nll_of_response_tokens_and_the_end_token(sft, base):
    """Against NumPy, a sequence at a time, without padding."""
    trained = rank(sft(), "sft")
    examples = trained.minibatch(0)
    loss = trained.accumulate(examples, int(trained.stage.weight_n[examples].sum()))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    total, count = 0.0, 0
    for k in examples:
        row = sft_rows(40)[k]
        prompt = tokenizer(row["prompt"])["input_ids"]
        text = [*prompt, *tokenizer(row["response"])["input_ids"], END]
        with torch.no_grad():
            logits_TV = model(torch.tensor([text])).logits[0].double().numpy()
        for t in range(len(prompt), len(text)):
            logits_V = logits_TV[t - 1]
            total += np.log(np.exp(logits_V).sum()) - logits_V[text[t]]
            count += 1
    assert trained.stage.weight_n[examples].sum() == count
    assert loss == pytest.approx(total / count, abs=1e-5)


def test_reward_model_loss_is_equation_3(reward, tmp_path):
    """−log σ(r(x, y_w) − r(x, y_l)) against NumPy, rewards read one sequence at a time from the
    directory that the stage writes."""
    trained = rank(reward(), "reward_model")
    trained.train(3)
    examples = trained.minibatch(3)
    loss = trained.accumulate(examples, len(examples))
    trained.export(str(tmp_path / "hf"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    terms = []
    for k in examples:
        row = preference_rows(40)[k]
        better, worse = (score(row["prompt_ids"] + row[n]) for n in ("chosen_ids", "rejected_ids"))
        terms.append(math.log1p(math.exp(-(better - worse))))
    assert loss == pytest.approx(np.mean(terms), abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_padding_and_micro_batches_change_neither_loss_nor_gradient(kind, sft, reward):
    settings = sft if kind == "sft" else reward
    seen = []
    for size in (0, 3, 1):
        trained = rank(settings(f"{kind}.micro_batch={size}"), kind)
        examples = trained.minibatch(0)
        loss = trained.accumulate(examples, int(trained.stage.weight_n[examples].sum()))
        seen.append((loss, gradients(trained)))
    for loss, gradient in seen[1:]:
        assert loss == pytest.approx(seen[0][0], abs=1e-5)
        assert np.allclose(gradient, seen[0][1], atol=1e-5)
    assert np.abs(seen[0][1]).max() > 1e-3


def test_a_score_is_the_end_tokens_and_does_not_depend_on_the_batch(reward, tmp_path):
    trained = rank(reward("reward_model.epochs=2"), "reward_model")
    trained.train(5)
    trained.export(str(tmp_path / "hf"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert model.config.pad_token_id == PAD and model.config.num_labels == 1
    text, longer = [FIRST, FIRST + 1, END], [FIRST] * 12 + [END]
    with torch.no_grad():
        alone = model(torch.tensor([text])).logits[0, 0]
        rows = torch.tensor([text + [PAD] * 10, longer])
        among = model(rows, attention_mask=(rows != PAD).long()).logits[0, 0]
        hidden = model.base_model(torch.tensor([text])).last_hidden_state[0, -1]
    assert float(among) == pytest.approx(float(alone), abs=1e-5)
    assert float((hidden @ model.score.weight[0]).detach()) == pytest.approx(float(alone), abs=1e-5)


def test_calibration_of_known_margins():
    """Margins log 3 (three right, p = 3/4) and −log 3 (one wrong): 4 pairs at confidence 3/4, 3/4
    of them right, so the error is 0; then one wrong more."""
    margin = math.log(3.0)
    good = calibration(np.array([margin, margin, margin, -margin]))
    assert good["held_out_accuracy"] == 0.75
    assert good["held_out_calibration_error"] == pytest.approx(0.0, abs=1e-12)
    assert good["held_out_brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert good["held_out_loss"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    bad = calibration(np.array([margin, margin, -margin, -margin, 0.0]))
    assert bad["held_out_accuracy"] == pytest.approx(2.5 / 5)
    assert bad["held_out_calibration_error"] == pytest.approx(4 / 5 * 0.25)


# --- order, hold-out, ranks ------------------------------------------------------------------


def test_an_epoch_takes_every_example_once_in_an_order_of_its_own(sft):
    trained = rank(sft("sft.held_out=0", "sft.epochs=2", "sft.minibatch=12"), "sft")
    epochs = [[trained.minibatch(4 * e + s) for s in range(4)] for e in range(2)]
    for epoch in epochs:
        assert {len(part) for part in epoch} == {10}
        assert sorted(np.concatenate(epoch)) == list(range(40))
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


def test_rows_of_a_held_out_prompt_are_all_held_out(base, tmp_path):
    rows = [{"prompt": "abcdefghij"[n % 10], "response": "a"} for n in range(60)]
    stage = open_stage(config_of("sft", base, write_rows(tmp_path / "r.jsonl", rows)), "sft")
    assert len(stage.held_out_k) == 6 and len(stage.train_k) == 54
    prompts = {rows[k]["prompt"] for k in stage.held_out_k}
    assert len(prompts) == 1 and not prompts & {rows[k]["prompt"] for k in stage.train_k}


@pytest.mark.parametrize("ranks, size", [(1, 4), (2, 3), (3, 2), (4, 1)])
def test_every_rank_gets_equally_many_micro_batches_and_every_example_once(ranks, size):
    examples, length_n = np.array([4, 9, 2, 7, 0]), np.arange(10)[::-1]
    dealt = [deal(examples, length_n, r, ranks, size) for r in range(ranks)]
    assert len({len(parts) for parts in dealt}) == 1
    assert max(len(part) for parts in dealt for part in parts) <= size
    assert sorted(np.concatenate([np.concatenate(parts) for parts in dealt])) == sorted(examples)


# --- resume, skips ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_a_resumed_stage_has_the_weights_of_an_uninterrupted_one_bit_for_bit(
    kind, sft, reward, tmp_path
):
    config = (sft if kind == "sft" else reward)(f"{kind}.epochs=2")
    whole = rank(config, kind)
    whole.train(9)
    first = rank(config, kind)
    first.train(4)
    first.save(str(tmp_path))
    second = rank(config, kind)
    second.load(str(tmp_path))
    second.train(5)
    assert second.position == 9
    assert np.array_equal(second.engine.weights(), whole.engine.weights())
    assert not np.array_equal(first.engine.weights(), whole.engine.weights())


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_step_that_is_not_finite_is_skipped_and_three_in_a_row_end_it(zero_stage, sft):
    trained = rank(sft("sft.epochs=4", f"learner.zero_stage={zero_stage}"), "sft")
    real = trained.stage.losses
    bad = {2, 5, 6, 7}

    def losses(output_N: torch.Tensor) -> torch.Tensor:
        return real(output_N) * (float("nan") if trained.position in bad else 1.0)

    trained.stage.losses = losses
    before = trained.engine.weights().copy()
    records = trained.train(20)
    assert [r.stepped for r in records] == [True, True, False, True, True, False, False, False]
    after = trained.engine.weights()
    assert np.isfinite(after).all() and not np.array_equal(before, after)


# --- what it writes --------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_model_directory_of_sft_is_a_policy(zero_stage, sft, tmp_path):
    """It loads with its tokenizer, ends responses with the end token, has the trained weights."""
    from actors import policy

    trained = rank(sft("sft.epochs=15", f"learner.zero_stage={zero_stage}"), "sft")
    losses = [r.loss for r in trained.train(100)]
    assert losses[-1] < 0.6 * losses[0]
    weights = trained.engine.weights().copy()
    folder = tmp_path / "hf"
    trained.export(str(folder))
    prompts = ["prompts.source=jsonl", "prompts.path=prompts.jsonl"]
    config = prepare("bandit", [f"policy.path={folder}", *prompts])
    model = policy.load_pretrained(config.policy, str(folder), config.learner.precision)
    assert np.array_equal(policy.flatten(model), weights)
    assert policy.end_tokens(policy.architecture(config)) == (END,)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = model.generate(**tokenizer("c a", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("c a c")
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_a_stage_trains_in_bfloat16_and_writes_it(kind, sft, reward, tmp_path):
    make, bfloat16 = sft if kind == "sft" else reward, "learner.precision=bfloat16"
    whole = [r.loss for r in rank(make(f"{kind}.epochs=4"), kind).train(2)]
    trained = rank(make(f"{kind}.epochs=4", bfloat16), kind)
    losses = [r.loss for r in trained.train(8)]
    trained.save(str(tmp_path / "at"))
    losses += [r.loss for r in trained.train(7)]
    assert np.allclose(losses[:2], whole, rtol=0.03) and losses[:2] != whole
    assert losses[-1] < 0.85 * losses[0]
    again = rank(make(f"{kind}.epochs=4", bfloat16), kind)
    again.load(str(tmp_path / "at"))
    assert [r.loss for r in again.train(7)] == losses[8:]
    assert {p.dtype for p in trained.engine.engine.module.parameters()} == {torch.bfloat16}
    trained.export(str(tmp_path / "hf"))
    kinds = {"sft": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    model = kinds[kind].from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16

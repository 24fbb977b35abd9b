"""SFT and reward models: losses are the references', whatever the batch; stages resume exactly."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.tables import DataError
from configs.load import prepare
from configs.schema import Config
from learner.engine import join
from learner.stages.plan import deal, open_stage
from learner.stages.reward_model import RewardModel, calibration
from learner.stages.sft import Sft
from learner.stages.supervised import Supervised
from tests.harness import free_port
from tests.stages import (
    END,
    FIRST,
    PAD,
    model_directory,
    preference_rows,
    sft_rows,
    write_rows,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp("base"))


def config_of(kind: str, base: str, path: str, *overrides: str) -> Config:
    own = [f"{kind}.model={base}", f"{kind}.path={path}", f"{kind}.minibatch=8", f"{kind}.lr=1e-2"]
    return prepare("bandit", [*own, *overrides])


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

    trained.stage.losses = losses  # type: ignore[method-assign]
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


# --- rows ------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are_and_end_once(base, tmp_path):
    rows = [
        {"prompt_ids": [3, 4], "response_ids": [5, END]},
        {"prompt_ids": [4], "response_ids": []},
        {"prompt": "a", "response": ""},
    ]
    stage = Sft(config_of("sft", base, write_rows(tmp_path / "r.jsonl", rows), "sft.held_out=0"))
    assert [r.tolist() for r in stage._responses] == [[5, END], [END], [END]]


def test_sft_learns_from_the_columns_of_public_sets(base, tmp_path):
    """UltraChat's conversations, AlpacaFarm's instructions: prompts as the encoder has them."""
    turns = ["a b", "c", "d e", "f g"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns)]
    rows = [
        {"messages": messages, "prompt_id": "x"},
        {"instruction": "a", "input": "b", "output": "c d"},
        {"prompt": messages[:1], "response": "c"},
        {"prompt": "a b", "response": "c"},
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    stage = Sft(config_of("sft", base, path, "sft.held_out=0"))
    encoder = stage.source.encoder
    asked = [messages[:3], [{"role": "user", "content": "a\nb"}], messages[:1], "a b"]
    assert [p.tolist() for p in stage._prompts] == [encoder(prompt) for prompt in asked]
    answers = ["f g", "c d", "c", "c"]
    assert [r.tolist() for r in stage._responses] == [encoder.response(text) for text in answers]
    with pytest.raises(DataError, match="no column 'prompt'"):
        Sft(config_of("sft", base, path, "sft.format=text"))


def test_sft_reads_a_subset_and_split_of_a_data_set(base, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}] * 3)
    datasets.DatasetDict({"sft": rows, "train": rows.select([0])}).save_to_disk(str(tmp_path / "d"))
    settings = ("sft.held_out=0", "sft.split=sft", "sft.format=alpaca")
    assert Sft(config_of("sft", base, str(tmp_path / "d"), *settings)).rows == 3


def test_rows_that_are_too_long_are_dropped_and_counted(base, tmp_path):
    rows = [{"prompt": "a", "response": " ".join("b" * n)} for n in (2, 22, 23, 30)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    at_context = Sft(config_of("sft", base, path, "sft.held_out=0"))
    assert at_context.dropped == {"too_long": 2} and at_context.rows == 4
    short = Sft(config_of("sft", base, path, "sft.held_out=0", "sft.max_tokens=4"))
    assert short.dropped == {"too_long": 3} and short.length_n.tolist() == [4]


def test_rows_of_equal_preference_are_dropped_and_counted(base, tmp_path):
    three = {"prompt_ids": [3], "responses_ids": [[4], [5, 5], [6]]}
    rows = [
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]},
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [4]},
        {**three, "rewards": [1.0, 1.0, 1.0]},
        {**three, "rewards": [1.0, 2.0, 1.0]},
        {**three, "labels": [1, 0, 0]},
        {**three, "rewards": [1.0, None, 3.0], "labels": [0, -1, 0]},
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    stage = RewardModel(config_of("reward_model", base, path, "reward_model.held_out=0"))
    assert stage.dropped == {"too_long": 0, "equal": 3} and stage.rows == 6
    pairs = [(better.tolist(), worse.tolist()) for better, worse in stage._pairs]
    assert pairs == [
        ([3, 4], [3, 5]),
        ([3, 5, 5], [3, 4]), ([3, 5, 5], [3, 6]),
        ([3, 4], [3, 5, 5]), ([3, 4], [3, 6]),
    ]  # fmt: skip


PAIR = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}
BAD_ROWS = [
    ("sft", {"prompt": "a"}, "line 1: no column 'response', found: prompt"),
    ("sft", {"response": "a"}, "no column 'prompt'"),
    ("sft", {"prompt": "", "response": "a"}, "the prompt has no tokens"),
    ("sft", {"prompt": 3, "response": "a"}, "column 'prompt' must be text"),
    ("sft", {"prompt_ids": [3], "response_ids": [16]}, "token id 16, outside the vocabulary of 16"),
    ("sft", {"prompt": "a", "response": "b " * 40}, "none of 1 rows can be used (too_long 1)"),
    ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "has 2 responses, and one is learned"),
    ("sft", {"prompt_ids": [3], "response": "a"}, "no column 'response_ids'"),
    ("sft", {"messages": [{"role": "user", "content": "a"}]}, "no column 'response'"),
    ("reward_model", {"prompt_ids": [3]}, "no responses; give chosen_ids and rejected_ids"),
    ("reward_model", {"prompt_ids": [3], "chosen_ids": [4]}, "no column 'rejected_ids'"),
    ("reward_model", {**PAIR, "chosen_ids": [4, PAD]}, "ends with the pad token 1"),
    ("reward_model", {"prompt_ids": [3], "responses_ids": [[4], [5]]}, "fewer than two responses"),
    ("reward_model", {**PAIR, "rejected_ids": [4]}, "none of 1 rows can be used (equal 1)"),
]


@pytest.mark.parametrize("kind, row, words", BAD_ROWS)
def test_a_bad_row_is_one_clear_line(kind, row, words, base, tmp_path):
    assert_refused(config_of(kind, base, write_rows(tmp_path / "r.jsonl", [row])), kind, words)


def test_bad_models_are_one_clear_line(tmp_path):
    text = write_rows(tmp_path / "text.jsonl", sft_rows(4))
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(4))
    bare = model_directory(tmp_path / "bare", tokenizer=False)
    unpadded = model_directory(tmp_path / "unpadded", pad=None)
    doubled = model_directory(tmp_path / "doubled", pad="<end>")
    at_odds = edited(model_directory(tmp_path / "at_odds"), eos_token_id=5)
    endless = edited(model_directory(tmp_path / "endless", tokenizer=False), eos_token_id=None)
    ids = write_rows(tmp_path / "ids.jsonl", [{"prompt_ids": [3], "response_ids": [4]}] * 4)
    rm = "reward_model"
    assert_refused(config_of("sft", bare, text), "sft", "has no tokenizer; give token ids")
    assert_refused(config_of("sft", endless, ids), "sft", "names an end token")
    assert_refused(config_of("sft", at_odds, text), "sft", "5 by its config.json, 0 by its token")
    assert_refused(config_of("sft", str(tmp_path / "none"), text), "sft", "cannot be read")
    assert_refused(config_of("sft", bare, str(tmp_path / "none.jsonl")), "sft", "none.jsonl")
    assert_refused(config_of("sft", "", ids), "sft", "sft.model=: there is no model")
    assert_refused(config_of("sft", bare, ""), "sft", "sft.path=: there are no rows")
    assert_refused(config_of(rm, unpadded, pairs), rm, "reward_model.pad_token=: ")
    assert_refused(config_of(rm, doubled, pairs), rm, "ends responses, too")
    assert_refused(config_of(rm, unpadded, pairs, f"{rm}.pad_token=nope"), rm, "is no token of")
    one_prompt = [{"prompt_ids": [3], "response_ids": [n]} for n in (4, 5)]
    path = write_rows(tmp_path / "one.jsonl", one_prompt)
    assert_refused(config_of("sft", bare, path), "sft", "set sft.held_out=0")


def test_a_pad_token_may_be_named(tmp_path):
    unpadded = model_directory(tmp_path / "unpadded", pad=None)
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(4))
    stage = RewardModel(config_of("reward_model", unpadded, pairs, "reward_model.pad_token=<pad>"))
    assert stage.network().config.pad_token_id == PAD


def edited(folder: str, **changes: object) -> str:
    """A model directory with other values in its config.json."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def assert_refused(config: Config, kind, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_stage(config, kind)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1

"""A low-rank adapter: what it trains, what leaves the learner, what a checkpoint has of it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors import policy
from actors.rollout import Version
from cluster import inputs
from configs.errors import ConfigError
from configs.schema_lora import LoraConfig
from learner import cells, checkpoint, lora
from learner.engine import join
from learner.lora import WithoutAdapter
from learner.publisher import AdapterPublisher, HostPublisher
from learner.replay import clients
from learner.stages.supervised import Supervised
from learner.worker import LearnerWorker
from tests import varying
from tests.harness import Local, free_port, settings
from tests.stages import model_directory, preference_rows, sft_rows, write_rows

RANK = ("learner.lora.rank=8", "learner.lora.alpha=16")
BANDIT = ("bandit_ppo", *RANK, "learner.lr=1e-2", "replay.inner_epochs=4")


def adapted(shape: str, precision: torch.dtype = torch.float32, **more: object):
    """A network, and it with an adapter of which B is not 0."""
    plain = varying.network(shape).eval().to(precision)
    network = lora.attach(
        copy.deepcopy(plain), LoraConfig(rank=4, **more), 0, "learner.lora"
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return plain, network


def flat(network) -> np.ndarray:
    return policy.flatten([piece.whole() for piece in lora.pieces(network)])


def logits(network) -> torch.Tensor:
    text_NT = torch.randint(0, varying.VOCABULARY, (3, 12), generator=torch.manual_seed(2))
    with torch.no_grad():
        return network(text_NT, use_cache=False).logits


# --- merged, and beside the weights ----------------------------------------------------------


@pytest.mark.parametrize("shape", varying.SHAPES)
def test_the_merged_weights_are_the_adapter_beside_the_base(shape):
    plain, network = adapted(shape)
    names, shapes = policy.layout(plain.config)
    pieces = lora.pieces(network)
    assert [piece.name for piece in pieces] == names
    assert [list(piece.whole().shape) for piece in pieces] == shapes
    merged = copy.deepcopy(plain)
    policy.unflatten(merged, flat(network))
    scale = logits(plain).abs().max()
    assert (logits(merged) - logits(network)).abs().max() < 1e-5 * scale
    assert (logits(merged) - logits(plain)).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_merged_weight_is_what_peft_merges(shape):
    _, network = adapted(shape)
    ours = {piece.name: piece.whole() for piece in lora.pieces(network)}
    layers = [(n, layer) for n, layer in network.named_modules() if hasattr(layer, "lora_A")]
    assert layers
    for name, layer in layers:
        layer.merge()
        assert torch.allclose(ours[f"{name}.weight"], layer.base_layer.weight, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_without_its_adapter_a_network_is_what_it_was_and_is_left_as_it_is(precision):
    plain, network = adapted("gpt2", precision, dropout=0.5)
    network.train()
    before = [p.requires_grad for p in network.parameters()]
    reference = WithoutAdapter(network)
    assert torch.equal(logits(reference), logits(plain))
    assert all(torch.equal(a, b) for a, b in zip(reference.base(), plain.parameters()))
    assert network.training and [p.requires_grad for p in network.parameters()] == before
    assert not torch.equal(logits(network), logits(plain))


def test_reading_the_weights_leaves_bfloat16_parameters_where_the_optimizer_has_them():
    _, network = adapted("llama", torch.bfloat16)
    before = [(p.data_ptr(), p.dtype) for p in network.parameters()]
    assert np.isfinite(flat(network)).all()
    assert [(p.data_ptr(), p.dtype) for p in network.parameters()] == before
    assert {dtype for _, dtype in before} == {torch.bfloat16}


def test_the_adapter_alone_added_to_the_base_is_the_merged_array():
    for shape in varying.SHAPES:
        plain, network = adapted(shape)
        alone = lora.low_rank(lora.pieces(network), lambda _: torch.no_grad(), ["base"])
        assert alone.base == ["base"] and alone.number_a.size < flat(network).size
        base = policy.flatten(plain)
        kept = base.copy()
        np.testing.assert_allclose(alone.onto(base), flat(network), atol=1e-6)
        assert np.array_equal(base, kept)


def test_targets_are_all_linear_layers_but_the_output_layer_or_those_named():
    network = varying.network("llama")
    all_of_them = lora.targets(network, LoraConfig(rank=4), "learner.lora")
    assert {name.rpartition(".")[2] for name in all_of_them} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    named = lora.targets(network, LoraConfig(rank=4, targets="q_proj,layers.1.mlp.up_proj"), "x")
    assert sorted(named) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        inputs.check(settings("bandit", *RANK, "learner.lora.targets=c_attn,q_proj"))
    assert str(refused.value) == (
        "learner.lora.targets=c_attn,q_proj: GPT2LMHeadModel has no linear layer q_proj under its "
        "output layer; name some of c_attn, c_fc or c_proj"
    )


# --- a run -----------------------------------------------------------------------------------


def test_the_bandit_learns_with_an_adapter_and_its_base_stays():
    """To the most that there is without the output layer and the last norm: 0.286, where training
    all weights comes to 1."""
    local = Local(settings(*BANDIT, "learner.updates=48"))
    initial, plain = local.learner.reference.weights(), local.learner.weights().copy()
    assert np.array_equal(initial, plain)  # B is 0
    rewards, mismatch = [], []
    for record in local.steps(48):
        rewards.append(record.index["reward_mean"])
        mismatch.append(cells.engine_mismatch(record.cells))
    assert np.mean(rewards[-8:]) > 0.2 > 3 * rewards[0]
    assert np.array_equal(local.learner.reference.weights(), initial)
    published = local.queue.weights[48][0]
    assert np.array_equal(published, local.learner.weights())
    known = [nats for nats in mismatch if nats is not None]
    assert len(known) >= 5 and max(known) < 1e-7  # merged and beside are one policy


def run(*overrides: str) -> tuple[list[float], np.ndarray]:
    local = Local(settings(*BANDIT, "learner.updates=4", *overrides))
    losses = [record.loss for record in local.steps(4)]
    return losses, local.learner.weights().copy()


def test_zero_stages_and_micro_batches_change_no_loss():
    whole = run()
    for overrides in (
        ["learner.zero_stage=1"], ["learner.zero_stage=2", "learner.micro_batch=20"],
        ["learner.zero_stage=3"],
    ):  # fmt: skip
        parts = run(*overrides)
        assert np.allclose(whole[0], parts[0], atol=1e-5), overrides
        assert np.abs(whole[1] - parts[1]).mean() < 1e-5


def test_the_reference_without_a_copy_of_the_weights_is_the_one_with_it():
    """Under ZeRO-3 there is a copy."""
    common = ("objective.kl_loss=0.1", "learner.exact_kl=false", "learner.packing=true")
    shared, copied = run(*common), run(*common, "learner.zero_stage=3")
    assert np.allclose(shared[0], copied[0], atol=1e-5)


def test_a_value_head_trains_beside_an_adapter():
    local = Local(settings("bandit_ppo_value", *RANK, "learner.updates=20", "learner.lr=5e-3"))
    initial = local.learner.reference.weights().copy()
    assert all(record.stepped for record in local.steps(20))
    head = local.learner.engine.engine.module.value_head
    assert head.weight.abs().max() > 0
    assert np.array_equal(local.learner.reference.weights(), initial)


# --- checkpoints, exports --------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage, dropout", [(0, 0.0), (0, 0.2), (2, 0.0), (3, 0.0)])
def test_a_resumed_learner_goes_on_bit_for_bit(tmp_path, zero_stage, dropout):
    config = settings(
        "bandit_reinforce", *RANK, "learner.updates=6", f"learner.zero_stage={zero_stage}",
        f"learner.lora.dropout={dropout}",
    )  # fmt: skip
    whole = Local(config)
    batches = []
    real = whole.learner.consume
    whole.learner.consume = lambda batch: (batches.append(batch), real(batch))[1]
    list(whole.steps(3))
    (tmp_path / "at").mkdir()
    checkpoint.save(whole.learner, whole.learner.engine.writer, str(tmp_path / "at"), [])
    whole.learner.engine.writer.wait()
    list(whole.steps(3))
    again = Local(config).learner
    checkpoint.load(again, str(tmp_path / "at"), 1)
    assert again.version == Version(1, 3)
    for batch in batches[3:]:
        again.consume(batch)
    assert np.array_equal(again.weights(), whole.learner.weights())


def test_a_checkpoint_has_the_adapter_and_not_the_base(tmp_path):
    sizes = {}
    for name, overrides in {"whole": (), "adapter": ("learner.lora.rank=1",)}.items():
        local = Local(settings("bandit_reinforce", *overrides, "learner.exact_kl=false"))
        checkpoint.save(local.learner, local.learner.engine.writer, str(tmp_path / name), [])
        local.learner.engine.writer.wait()
        sizes[name] = sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file())
    assert sizes["adapter"] < 0.2 * sizes["whole"]


def test_an_export_is_merged_and_opens_with_transformers(tmp_path):
    config = settings(*BANDIT, "learner.updates=3")
    local = Local(config)
    list(local.steps(3))
    worker = LearnerWorker(config, 0, "")
    worker.learner = local.learner
    worker.export(str(tmp_path / "hf"))
    assert {f.suffix for f in (tmp_path / "hf").iterdir()} == {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert np.array_equal(policy.flatten(model), local.learner.weights())
    assert not np.array_equal(local.learner.reference.weights(), local.learner.weights())


# --- the adapter alone -----------------------------------------------------------------------


def test_actors_make_of_the_adapter_alone_what_they_get_merged(monkeypatch):
    """With a list in place of Ray's object store."""
    store: list = []
    monkeypatch.setattr(clients.ray, "get", lambda place, timeout=None: store[place])

    def put(value) -> int:
        store.append(copy.deepcopy(value))
        return len(store) - 1

    config = settings(*BANDIT, "learner.updates=3", "rollout.adapter_only=true")
    local = Local(config)
    host = HostPublisher(config, local.learner, 0, put)
    alone = AdapterPublisher(config, local.learner, 0, put)
    for _ in range(2):
        list(local.steps(1))
        merged, adapter = store[host.publish(True)], store[alone.publish(True)]
        assert adapter.number_a.nbytes < merged.nbytes / 2 and adapter.base == [alone.initial()]
        found = clients.received(adapter, 1.0)
        np.testing.assert_allclose(found, merged, atol=1e-6)
        assert not np.array_equal(merged, local.learner.reference.weights())
    assert np.array_equal(
        clients.received(store[alone.initial()], 1.0), local.learner.reference.weights()
    )
    assert AdapterPublisher(config, local.learner, 1, put).publish(True) is None


# --- stages ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp("base"))


def stage(kind, base: str, folder: Path, *overrides: str) -> Supervised:
    rows = sft_rows(40) if kind == "sft" else preference_rows(40)
    path = write_rows(folder / "rows.jsonl", rows)
    own = [f"model={base}", f"path={path}", "minibatch=8", "lr=2e-2", "epochs=10", "lora.rank=4"]
    join(0, 1, ("127.0.0.1", free_port()), 1)
    config = settings("bandit", *(f"{kind}.{text}" for text in own), *overrides)
    return Supervised(config, kind, 0)


@pytest.mark.parametrize("kind, zero_stage", [("sft", 0), ("sft", 3), ("reward_model", 2)])
def test_a_stage_trains_an_adapter_resumes_and_exports_it_merged(kind, zero_stage, base, tmp_path):
    overrides = [f"learner.zero_stage={zero_stage}"]
    trained = stage(kind, base, tmp_path, *overrides)
    losses = [record.loss for record in trained.train(15)]
    trained.save(str(tmp_path / "at"))
    losses += [record.loss for record in trained.train(5)]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])  # its output layer is a random one
    again = stage(kind, base, tmp_path, *overrides)
    again.load(str(tmp_path / "at"))
    assert [record.loss for record in again.train(5)] == losses[15:]
    trained.export(str(tmp_path / "hf"))
    kinds = {"sft": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    out, begun = (kinds[kind].from_pretrained(p) for p in (tmp_path / "hf", base))
    assert np.array_equal(policy.flatten(out), trained.engine.weights())
    changed = {
        name for (name, one), other in zip(out.named_parameters(), begun.parameters())
        if not torch.equal(one, other)
    }  # fmt: skip
    adapted_ = {p.name for p in lora.pieces(trained.engine.policy) if p.layer is not None}
    assert changed == adapted_ | ({"score.weight"} if kind == "reward_model" else set())


def test_a_stage_whose_targets_are_not_there_is_one_line(base, tmp_path):
    with pytest.raises(ConfigError, match="sft.lora.targets=q_proj: .* no linear layer q_proj"):
        stage("sft", base, tmp_path, "sft.lora.targets=q_proj")

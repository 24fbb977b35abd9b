"""A checkpoint has the adapter and not its base; an export is merged; actors can get it alone."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors import policy
from actors.rollout import Version
from configs.errors import ConfigError
from learner import checkpoint, lora
from learner.engine import join
from learner.publisher import AdapterPublisher, HostPublisher
from learner.replay import clients
from learner.stages.supervised import Supervised
from learner.worker import LearnerWorker
from tests import varying
from tests.harness import Local, free_port, settings
from tests.low_rank import BANDIT, RANK, adapted, flat
from tests.stages import model_directory, preference_rows, sft_rows, write_rows

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


def test_the_adapter_alone_added_to_the_base_is_the_merged_array():
    for shape in varying.SHAPES:
        plain, network = adapted(shape)
        alone = lora.low_rank(lora.pieces(network), lambda _: torch.no_grad(), ["base"])
        assert alone.base == ["base"] and alone.number_a.size < flat(network).size
        base = policy.flatten(plain)
        kept = base.copy()
        np.testing.assert_allclose(alone.onto(base), flat(network), atol=1e-6)
        assert np.array_equal(base, kept)


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

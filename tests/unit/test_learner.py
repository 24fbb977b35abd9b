"""The learner's laws, over the real queue, engine and DeepSpeed, in one process."""

import numpy as np
import pytest
import torch

from actors import policy
from actors.randomness import stream_key, uniforms
from actors.rollout import GroupId, Version
from actors.torch_engine import TorchEngine, inverse_cdf
from learner import cells
from learner.batch import conditionals, pad, token_logps
from learner.engine import learning_rate
from learner.objectives import Objective
from learner.stages.bandit import divergence_from, initial_policy, reference_histogram
from tests.harness import Local, settings


def plain_reinforce(config, updates: int) -> tuple[list[float], np.ndarray]:
    """REINFORCE on the bandit without any of our parts but the keyed uniforms: 40 lines."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(initial_policy(config))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learner.lr)
    key = stream_key(config.seed, "rollout")
    losses = []
    for update in range(updates):
        position = np.repeat(np.arange(10) + 10 * update, 10)
        member = np.tile(np.arange(10), 10)
        tokens = torch.from_numpy(position % 10)[:, None]
        with torch.no_grad():
            for t in range(10):
                logp = model(tokens).logits[:, -1].log_softmax(-1)
                tokens = torch.cat(
                    [tokens, inverse_cdf(logp, uniforms(key, position, member, t))[:, None]], 1
                )
        response = tokens[:, 1:]
        reward = torch.exp(-(((response.double() - 70) / 10) ** 2)).mean(1)
        standardised = ((reward - reward.mean()) / reward.std()).float()
        logp = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, response[..., None])
        loss = -(logp[..., 0].sum(1) * standardised).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, policy.flatten(model)


def test_max_age_0_is_plain_on_policy_reinforce():
    config = settings("bandit_reinforce", "learner.updates=20", "replay.max_age=0")
    local = Local(config)
    ours = [record.loss for record in local.steps(20)]
    losses, weights = plain_reinforce(config, 20)
    apart = np.abs(local.learner.weights() - weights)
    assert np.allclose(ours, losses, rtol=1e-4, atol=1e-4)
    # Adam turns the rounding of a gradient near 0 into a step of any size up to lr: so the mean.
    assert apart.mean() < 1e-6 and apart.max() < config.learner.lr


def run(config, actors: int = 1) -> tuple[list[float], np.ndarray]:
    local = Local(config, actors)
    losses = [record.loss for record in local.steps(config.learner.updates)]
    return losses, local.learner.weights().copy()


def test_equal_seeds_give_bit_equal_lockstep_runs_also_with_two_actors():
    config = settings("bandit", "learner.updates=20", "rollout.lease=5")
    one, again, two = run(config), run(config), run(config, actors=2)
    other = run(settings("bandit", "learner.updates=20", "rollout.lease=5", "seed=1"))
    assert one[0] == again[0] == two[0] != other[0]
    assert np.array_equal(one[1], again[1]) and np.array_equal(one[1], two[1])


def test_the_engines_log_probabilities_are_the_learners_at_age_0():
    local = Local(settings("bandit_reinforce", "rollout.temperature=0.7", "learner.updates=3"))
    list(local.steps(2))
    local.generate()
    batch = pad(local.queue.get(0, 2, 0).block)
    with torch.no_grad():
        logp_NL = token_logps(conditionals(local.learner.engine.engine, batch), batch)
    assert batch.versions() == [Version(0, 2)]
    assert (logp_NL - batch.logp_NL).abs().max() < 1e-5


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_skips_its_step_uses_its_batch_and_makes_no_version(zero_stage):
    config = settings("bandit_reinforce", "learner.updates=6", f"learner.zero_stage={zero_stage}")
    local = Local(config)
    real = local.learner.objective
    before = None
    stepped = []
    for number in range(6):
        broken = Objective(real.name, real.traits, lambda x, s: x.logp_NL.sum() * float("nan"))
        local.learner.objective = broken if number == 3 else real
        before = local.learner.weights().copy()
        record = next(local.steps(1))
        stepped.append(record.stepped)
        assert np.array_equal(before, local.learner.weights()) == (not record.stepped)
    assert stepped == [True, True, True, False, True, True]
    assert local.queue.version == local.learner.version == Version(0, 5)
    assert local.queue.committed == 6
    assert local.queue.ledger.retired["exhausted"] == local.queue.ledger.issued == 600
    assert np.isfinite(local.learner.weights()).all()


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_change_no_loss(zero_stage):
    whole = run(settings("bandit_ppo", "learner.updates=4"))
    parts = run(settings("bandit_ppo", "learner.updates=4", f"learner.zero_stage={zero_stage}"))
    assert np.allclose(whole[0], parts[0], atol=1e-5)


def test_accumulating_micro_batches_changes_no_loss():
    whole = run(settings("bandit_ppo", "learner.updates=4"))
    parts = run(settings("bandit_ppo", "learner.updates=4", "learner.micro_batch=20"))
    assert np.allclose(whole[0], parts[0], atol=1e-5)
    assert np.abs(whole[1] - parts[1]).max() < 1e-4


def test_kl_to_the_generator_is_zero_at_age_0_and_grows_with_age():
    local = Local(settings("bandit_ppo", "learner.updates=20"))
    by_age: dict[int, list[dict[str, float]]] = {}
    for record in local.steps(20):
        for (age, reuse), sums in record.cells.items():
            assert reuse == age + 1
            by_age.setdefault(age, []).append(cells.finish(sums))
    assert all(abs(m["kl_to_generator"]) < 1e-6 and m["ess"] > 1 - 1e-6 for m in by_age[0])
    for direction in ("kl_to_generator", "kl_from_generator"):
        kl = [np.mean([m[direction] for m in by_age[age]]) for age in range(10)]
        assert all(later > 0 for later in kl[1:]) and kl[9] > kl[2] > kl[0]


def test_gradient_shares_of_all_cells_add_up_to_one():
    local = Local(settings("bandit_ppo", "learner.updates=10"))
    added = cells.add(record.cells for record in local.steps(10))
    assert sum(row["gradient_share"] for row in cells.table(added)) == pytest.approx(1.0)


def test_the_proximal_policy_is_the_learners_at_first_use_and_stays():
    local = Local(settings(
        "bandit_ppo", "objective.proximal=first_use", "learner.updates=8", "replay.lag=2",
        "replay.inner_epochs=4", "learner.micro_batch=30",
    ))  # fmt: skip
    for _ in range(2):  # rounds, of four passes each
        local.generate()
        block = local.queue.get(0, local.queue.committed, 0).block
        assert not block.derived
        with torch.no_grad():
            now_NLV = conditionals(local.learner.engine.engine, pad(block))
        first_use = token_logps(now_NLV, pad(block)).numpy().ravel()
        stored = []
        for _ in range(3):
            list(local.steps(1))
            again = local.queue.get(0, local.queue.committed, 0).block
            stored.append(again.derived["proximal_logp_K"])
        list(local.steps(1))
        assert np.allclose(stored[0], first_use, atol=1e-5)
        assert np.array_equal(stored[0], stored[1]) and np.array_equal(stored[0], stored[2])
    assert np.abs(stored[0] - block.logp_K).max() > 1e-3  # older weights generated it


def test_decoupled_ppo_clips_nothing_at_first_use_however_old():
    config = settings(
        "bandit_ppo", "objective.proximal=first_use", "learner.updates=8", "replay.lag=2",
        "replay.inner_epochs=2", "learner.lr=0.01",
    )  # fmt: skip
    by_reuse: dict[int, list[float]] = {1: [], 2: []}
    for record in Local(config).steps(8):
        for (age, reuse), sums in record.cells.items():
            assert age >= 0
            by_reuse[reuse].append(cells.finish(sums)["clip_fraction"])
    assert max(by_reuse[1]) == 0.0 < max(by_reuse[2])


def test_decoupled_ppo_is_ppo_where_the_first_use_is_at_age_0():
    plain = run(settings("bandit_ppo", "learner.updates=12"))
    decoupled = run(settings("bandit_ppo", "learner.updates=12", "objective.proximal=first_use"))
    assert np.allclose(plain[0], decoupled[0], atol=1e-4)
    assert np.abs(plain[1] - decoupled[1]).mean() < 1e-5


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_an_importance_weight_changes_no_loss_at_age_0_and_one_of_older_samples(importance):
    common = ("bandit_reinforce", "learner.updates=3", "replay.lag=1")
    plain = run(settings(*common))[0]
    weighted = run(settings(*common, f"objective.importance={importance}"))[0]
    assert np.isclose(plain[0], weighted[0], atol=1e-4)
    assert not np.isclose(plain[1], weighted[1], atol=1e-4)


def test_the_fitted_reference_has_the_constructions_frequencies():
    config = settings("bandit")
    shares = reference_histogram(config.policy.bandit)
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] == pytest.approx(0.5 + np.arctan(-0.3 / 0.4) / np.pi, abs=0.02)  # clipped mass
    model = policy.load_pretrained(config.policy, initial_policy(config), config.learner.precision)
    torch.manual_seed(1)
    with torch.no_grad():
        divergence = divergence_from(model, torch.from_numpy(shares).float(), 10, 256)
    assert divergence.max() < 2 * config.policy.bandit.fit_tolerance


def test_sampled_frequencies_are_those_of_the_reference():
    config = settings("bandit", "rollout.responses_per_prompt=100", "learner.minibatch=1000",
                      "replay.samples_per_round=1000")  # fmt: skip
    from actors.engine import Request
    from cluster import inputs

    engine = TorchEngine(config)
    model = policy.load_pretrained(config.policy, initial_policy(config), config.learner.precision)
    engine.load(policy.flatten(model), Version(0, 0))
    prompts = inputs.prompts(config)
    block = engine.generate([Request(GroupId(p, 0), prompts[p]) for p in range(20)], "rollout")
    seen = np.bincount(block.token_K, minlength=100) / len(block.token_K)
    expected = reference_histogram(config.policy.bandit)
    tolerance = 5 * np.sqrt(expected * (1 - expected) / len(block.token_K)) + 1e-3
    assert (np.abs(seen - expected) < tolerance).all()


def test_an_engine_without_weights_refuses_to_sample():
    with pytest.raises(RuntimeError, match="no weights are loaded"):
        TorchEngine(settings("bandit")).generate([], "rollout")


def test_the_learning_rate_warms_up_and_decays():
    config = settings("bandit", "learner.schedule=linear", "learner.warmup=10").learner
    assert learning_rate(config, 0) == pytest.approx(config.lr / 10)
    assert learning_rate(config, 10) == pytest.approx(config.lr)
    assert learning_rate(config, 1000) == 0.0


def test_weights_survive_the_way_through_the_flat_array():
    config = settings("bandit")
    one, other = (policy.build(policy.architecture(config)) for _ in range(2))
    policy.unflatten(other, policy.flatten(one))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="this architecture"):
        policy.unflatten(other, policy.flatten(one)[:-1])


def test_offline_rollouts_have_no_age_and_no_cell_of_one(tmp_path):
    from actors.dataset_engine import DatasetEngine, DatasetPrompts
    from actors.preferences import from_rollouts, write_parquet
    from cluster.inputs import offline_groups

    local = Local(settings("bandit", "learner.updates=10"))
    list(local.steps(1))
    path = str(tmp_path / "data.parquet")
    write_parquet(path, from_rollouts(local.queue.get(0, 1, 0).block))
    offline = Local(settings("offline_ipo", f"data.path={path}", "learner.updates=30"))
    groups = offline_groups(offline.config, path)
    for actor in offline.actors:
        actor.engine, actor.prompts = DatasetEngine(groups, 1.0), DatasetPrompts(groups)
    records = list(offline.steps(30))
    assert {cell[0] for record in records for cell in record.cells} == {-1}
    assert not offline.queue.ledger.age
    assert max(offline.queue.ledger.reuse) == 30  # 3 epochs of T = 10 over the same rows
    assert records[-1].loss < records[0].loss


def mismatches(config, broken: bool) -> list[float | None]:
    """engine_mismatch_kl of each step; `broken` weights are announced and never loaded."""
    local = Local(config)
    engine = local.actors[0].engine
    load = engine.load

    def forgets(weights: np.ndarray, version: Version) -> None:
        if version.step and broken:
            engine.version = version
        else:
            load(weights, version)

    engine.load = forgets
    return [cells.engine_mismatch(record.cells) for record in local.steps(4)]


def test_a_forgotten_update_shows_in_the_engine_mismatch():
    config = settings("bandit_reinforce", "learner.updates=4", "learner.lr=1e-4")
    limit = config.limits.engine_mismatch_kl
    floor, trip = mismatches(config, broken=False), mismatches(config, broken=True)
    assert all(kl is not None and kl < limit / 100 for kl in floor)
    assert trip[0] == floor[0] and all(kl > limit for kl in trip[1:])


def test_without_age_0_there_is_no_engine_mismatch():
    config = settings("bandit_reinforce", "learner.updates=3", "replay.lag=1", "replay.max_age=1")
    records = list(Local(config).steps(3))
    assert [cells.engine_mismatch(record.cells) is None for record in records] == [
        False, True, True,
    ]  # fmt: skip

"""Who imports what: a process that needs no network does not pay the seconds that torch and
transformers take to import, at the start and after every crash.

Each function below is a process's work, done in a process of its own.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "deepspeed", "vllm", "matplotlib"}
ROOT = Path(__file__).parents[2]


def the_queue(folder: Path) -> None:
    """Lease, put, freeze, commit; killed and brought back from its journal; rolled back."""
    import asyncio

    import numpy as np

    from actors.actor import Lease
    from actors.engine import Request
    from actors.packing import pack
    from actors.probe import Probe, text
    from actors.prompts import Prompt
    from actors.rollout import Version
    from configs.load import prepare
    from learner.replay.cuts import STATE
    from learner.replay.service import QueueService
    from learner.replay.settings import of

    sizes = ("replay.samples_per_round=4", "learner.minibatch=4", "rollout.lease=2")
    config = prepare("bandit", [*sizes, "rollout.responses_per_prompt=2"])
    settings = of(config, folder / "journal", folder)
    weights = ["reference", Probe(text(0, 100, 16), np.zeros((4, 10), dtype=np.float32))]
    derived = {"reference_logp_K": np.zeros(4, dtype=np.float32)}

    async def one_batch(queue: QueueService) -> None:
        await queue.publish(Version(0, 0), weights)
        lease = await queue.lease(0)
        assert isinstance(lease, Lease) and lease.probe is not None
        requests = [
            Request(group, Prompt(np.zeros(1, dtype=np.int32), 0)) for group in lease.groups
        ]
        ones_K, zeros_K = np.ones(4, dtype=np.int64), np.zeros(4)
        block = pack(requests, 2, 1.0, ones_K, ones_K, zeros_K, zeros_K, zeros_K)
        block.reward_N[:] = 1.0
        await queue.put(lease, block, 0.0)
        assert (await queue.get(0, 0, 0)).index is not None
        await queue.commit(0, 0, 0, True, derived, weights, cut=str(folder))
        await queue.written(1, str(folder))

    async def come_back(queue: QueueService) -> None:
        assert queue.queue.committed == 1 and (folder / STATE).exists()
        assert await queue.roll_back(str(folder), actors_died=True) == (1, 1)

    asyncio.run(one_batch(QueueService(settings)))
    asyncio.run(come_back(QueueService(settings)))


def the_reward_replica(folder: Path) -> None:
    """Every kind of reward without a network; the HTTP endpoint is imported too."""
    from configs.choices import RewardKind
    from configs.schema import RewardConfig
    from reward_server import endpoint, service
    from reward_server.client import Pairs
    from reward_server.scorer import Scorer

    assert service and endpoint
    function = RewardConfig(RewardKind.function, path="reward_server.examples:distinct_tokens")
    for config in (RewardConfig(), RewardConfig(RewardKind.length), function):
        scorer = Scorer(config, str(folder), 1.0, 1)
        assert not scorer._score_all([Pairs.pack([[0]], [[70, 70]])])[0].failures


def the_driver(folder: Path) -> None:
    """What `python -m cluster train` does before the first part starts, and the parts' handles;
    the reward is a model, whose files are looked at."""
    import numpy as np
    from safetensors.numpy import save_file

    import cluster.__main__
    from cluster import inputs, run_directory, scorers, train
    from configs.load import prepare

    assert train and cluster.__main__
    save_file({"score.weight": np.zeros((1, 8))}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"vocab_size": 100}')
    model = ["reward.kind=model", f"reward.path={folder}", "gold.kind=peak"]
    config = prepare("bandit", [f"run.dir={folder}", *model])
    inputs.check(config)
    scorers.keep(run_directory.claim(config, "bandit").path, config)


def an_actor_of_offline_data(folder: Path) -> None:
    """From its start to its engine."""
    from cluster import inputs
    from cluster.rollout_worker import RolloutWorker
    from configs.load import prepare

    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt_ids": [0], "chosen_ids": [1, 2], "rejected_ids": [3]}\n')
    config = prepare("offline_ipo", ["rollout.responses_per_prompt=2"])
    assert RolloutWorker(config, 0, str(rows), str(folder)).ready()
    assert len(inputs.offline_data(config, str(rows))) == 1


def a_rollout_actor(folder: Path) -> None:
    """The bandit's, from its start to its engine."""
    from cluster.rollout_worker import RolloutWorker
    from configs.load import prepare

    assert RolloutWorker(prepare("bandit", []), 0, "", str(folder)).ready()


def an_evaluator(folder: Path) -> None:
    """The bandit's, until π_ref's weights are in it."""
    import numpy as np

    from actors import policy
    from cluster.evaluate import Evaluator
    from configs.load import prepare

    evaluator = Evaluator(prepare("bandit", []))
    numbers = sum(p.numel() for p in policy.parameters(evaluator.engine.model))
    evaluator.start(None, np.zeros(numbers, dtype=np.float32))


def a_learner_rank(folder: Path) -> None:
    """The bandit's, what it imports before it is started."""
    from configs.load import prepare
    from learner.worker import LearnerWorker

    assert LearnerWorker(prepare("bandit", []), 0, str(folder)).rank == 0


SERVE = {"ray.serve", "pandas", "fastapi"}  # while the parts start, and not before they are asked
OTHERS = {"vllm", "datasets", "peft", "matplotlib", "pandas"}


def imported(work: Callable[[Path], None], folder: Path) -> set[str]:
    """Every module that a process of this work has at its end."""
    program = (
        "import sys; from pathlib import Path; from tests.unit import test_imports; "
        f"test_imports.{work.__name__}(Path(sys.argv[1])); print(*sys.modules)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("work", [the_queue, the_reward_replica, an_actor_of_offline_data])
def test_a_process_without_a_network_imports_neither_torch_nor_transformers(work, tmp_path):
    assert not HEAVY & imported(work, tmp_path)


def test_the_driver_asks_for_the_parts_before_it_imports_serve(tmp_path):
    assert not (HEAVY | SERVE) & imported(the_driver, tmp_path)


@pytest.mark.parametrize("work", [a_rollout_actor, an_evaluator])
def test_who_samples_the_bandit_imports_no_transformers(work, tmp_path):
    others = OTHERS | {"deepspeed", "transformers", "torch._dynamo", "torch.distributed.tensor"}
    assert not others & imported(work, tmp_path)


def test_the_bandits_learner_imports_only_what_it_uses(tmp_path):
    assert not OTHERS & imported(a_learner_rank, tmp_path)

"""What only GPUs can show: real NCCL, CUDA's memory handles, vLLM asleep. Not run so far."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.train import train
from configs.load import prepare

GPUS = torch.cuda.device_count()
NARROW = ["policy.bandit.width=64", "policy.bandit.heads=2"]
TWO = ["cluster.learner_gpus=1", "cluster.actor_gpus=1", "rollout.transfer=nccl"]
ONE = [
    "cluster.colocated=true", "cluster.learner_gpus=0.5", "cluster.actor_gpus=0.4",
    "cluster.evaluator_gpus=0.1", "rollout.vllm.gpu_memory_utilization=0.3",
]  # fmt: skip

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def needs(gpus: int) -> Any:
    why = f"needs {gpus} NVIDIA GPU(s), here are {GPUS}: the device communication is unproven"
    return pytest.mark.skipif(gpus > GPUS, reason=why)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    common = [f"run.dir={folder}", "run.name=gpu", "learner.updates=60", "eval.samples=100"]
    train(prepare("bandit_vllm", [*common, *overrides]), "bandit_vllm")
    out: dict[str, Any] = json.loads((folder / "gpu" / "summary.json").read_text())
    assert out["status"] == "finished" and out["engine_mismatch_alarms"] == 0
    assert out["ledger"]["issued"] == sum(out["ledger"]["retired"].values())
    assert out["reward_eval"] > out["reward_initial"]
    return out


@needs(1)
@pytest.mark.parametrize("transfer", ["ipc", "host"])
def test_learner_and_vllm_take_turns_on_one_gpu(tmp_path, transfer):
    assert run(tmp_path, *NARROW, *ONE, f"rollout.transfer={transfer}")["age"]["max"] == 9


@needs(1)
def test_learner_and_vllm_share_one_gpu_without_turns(tmp_path):
    shares = ["cluster.learner_gpus=0.5", "cluster.actor_gpus=0.5",
              "rollout.vllm.gpu_memory_utilization=0.3"]  # fmt: skip
    run(tmp_path, *NARROW, *shares)


@needs(2)
def test_nccl_carries_every_version_in_lockstep(tmp_path):
    assert run(tmp_path, *NARROW, *TWO)["age"]["max"] == 9


@needs(2)
def test_nccl_updates_in_flight_are_true_versions(tmp_path):
    pipelined = ["objective.name=ppo", "objective.ratio=token", "objective.proximal=first_use",
                 "replay.inner_epochs=1", "replay.schedule=pipelined", "replay.max_age=4",
                 "rollout.update=in_flight"]  # fmt: skip
    assert run(tmp_path, *NARROW, *TWO, *pipelined)["age"]["max"] <= 4


@needs(4)
def test_zero_3_ranks_and_a_tensor_parallel_engine(tmp_path):
    wide = ["cluster.learner_gpus=1", "learner.ranks=2", "learner.zero_stage=3",
            "cluster.actor_gpus=2", "rollout.vllm.tensor_parallel=2",
            "rollout.transfer=nccl"]  # fmt: skip
    run(tmp_path, *NARROW, *wide)

"""Responses per second of RLOO and online DPO beside TRL's, on the same tiny GPT-NeoX, prompts,
lengths and cores.

64 responses of up to 64 tokens a step (RLOO 8 to a prompt, DPO 2), one pass, Adam, a reward on
token ids; both look at π_ref. TRL 1.16 generates with transformers in one process, on both cores.
Ours goes through actor, reward service, queue and learner, in kept processes: in lockstep, each
with two threads, and pipelined, with one and the learner's π_ref with one more. All take turns,
each timed from its second step on. In TRL's first step our objective's gradient is compared with
TRL's, on TRL's own tensors.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig

from actors import policy
from benchmarks.trl_trainers import Clock, online_dpo_trainer, race, rloo_trainer
from cluster import connection
from cluster.crew import Crew
from cluster.train import train
from configs.load import prepare

TURNS, UPDATES = 3, 16
RESPONSES, TOKENS, PROMPT = 64, 64, 8
VOCABULARY = 1024
GROUPS = {"rloo": 8, "online_dpo": 2}  # responses to a prompt
SHAPE = GPTNeoXConfig(
    vocab_size=VOCABULARY, hidden_size=96, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=3, max_position_embeddings=128, hidden_dropout=0.0, attention_dropout=0.0,
    bos_token_id=None, eos_token_id=0, pad_token_id=1,
)  # fmt: skip
PIPELINED = ["replay.schedule=pipelined", "replay.max_age=3"]


def score(prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """The share of different tokens, and a little of their ids so that no two are equal."""
    return [
        len(set(ids)) / max(1, len(ids)) + 1e-8 * sum(n * t for n, t in enumerate(ids))
        for ids in responses
    ]


def _write(folder: Path) -> None:
    """Network, tokenizer (word n is token n) and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    policy.build(SHAPE).save_pretrained(folder / "model")
    words = {f"w{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w1")
    fast.save_pretrained(folder / "tokenizer")
    rows = [[(7 * n + 13 * k) % VOCABULARY for k in range(PROMPT)] for n in range(256)]
    lines = [json.dumps({"prompt_ids": row}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def theirs(folder: Path, method: str) -> Clock:
    """TRL's turn."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    texts = [" ".join(f"w{t}" for t in row["prompt_ids"]) for row in rows]
    usual: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": UPDATES, "use_cpu": True, "bf16": False,
        "learning_rate": 1e-4, "gradient_checkpointing": False, "report_to": "none",
        "logging_steps": 10**6, "save_strategy": "no", "disable_tqdm": True, "temperature": 1.0,
        "max_grad_norm": 0.0,
    }  # fmt: skip
    if method == "rloo":
        from trl import RLOOConfig

        settings: Any = RLOOConfig(
            per_device_train_batch_size=RESPONSES, num_generations=GROUPS[method], beta=0.05,
            max_completion_length=TOKENS, **usual,
        )  # fmt: skip
        trainer = rloo_trainer()
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig

        settings = OnlineDPOConfig(
            per_device_train_batch_size=RESPONSES // 2, max_new_tokens=TOKENS, beta=[0.1], **usual
        )
        trainer = online_dpo_trainer()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    return race(
        trainer, settings, score, model=str(folder / "model"), processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )  # fmt: skip


def ours(folder: Path, method: str, crew: Crew, more: list[str]) -> float:
    """Our responses per second, from the second step on as for TRL, by the learner's clock."""
    config = prepare({"rloo": "bandit_ppo", "online_dpo": "bandit_dpo"}[method], [
        f"run.dir={folder}/runs", f"policy.path={folder}/model", "prompts.source=jsonl",
        f"prompts.path={folder}/prompts.jsonl", "prompts.count=0", f"learner.updates={UPDATES}",
        f"rollout.responses_per_prompt={GROUPS[method]}", f"rollout.max_tokens={TOKENS}",
        f"replay.samples_per_round={RESPONSES}", f"learner.minibatch={RESPONSES}",
        "replay.inner_epochs=1", "objective.advantage=leave_one_out", "learner.lr=1e-4",
        "reward.kind=function", "reward.path=benchmarks.trl:score", "eval.every=0",
        "eval.samples=8", "checkpoint.seconds=0", "learner.exact_kl=false",
        f"rollout.lease={RESPONSES // GROUPS[method]}", *more,
    ])  # fmt: skip
    summary = train(config, "bench-trl", crew)
    if summary["status"] != "finished":
        raise RuntimeError(f"the run ended as {summary['status']}: {summary['failure']}")
    lines = (folder / "runs" / summary["name"] / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines[1:]]
    return RESPONSES * len(seconds) / sum(seconds)


def main(overrides: list[str]) -> None:
    """Print rates and ratios, with their spread, and write them. overrides: settings of ours."""
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder)
        with connection.connected(prepare("bandit", []).cluster):
            crew = Crew(keep=True)
            ours(folder, "rloo", crew, overrides)  # its processes stay, their imports done
            for turn in range(TURNS):
                for method in GROUPS:
                    clock = theirs(folder, method)
                    row: dict[str, Any] = {
                        "method": method, "turn": turn, "gradients_apart": clock.apart,
                        "trl": clock.rate(RESPONSES),
                        "lockstep": ours(folder, method, crew, ["cluster.threads=2", *overrides]),
                        "pipelined": ours(folder, method, crew, [*PIPELINED, *overrides]),
                    }  # fmt: skip
                    print(_line(row), flush=True)
                    rows.append(row)
            crew.end()
    for method in GROUPS:
        for way in ("lockstep", "pipelined"):
            ratios = [row[way] / row["trl"] for row in rows if row["method"] == method]
            print(
                f"{method}, {way}: responses/s over TRL's = {statistics.median(ratios):.2f} "
                f"(from {min(ratios):.2f} to {max(ratios):.2f})"
            )
    target = Path("runs/bench")
    target.mkdir(parents=True, exist_ok=True)
    (target / "trl.json").write_text(json.dumps(rows, indent=2) + "\n")


def _line(row: dict[str, Any]) -> str:
    rates = "  ".join(f"{name} {row[name]:.1f}" for name in ("trl", "lockstep", "pipelined"))
    return f"{row['method']} {row['turn']}: {rates}  gradients apart {row['gradients_apart']:.1e}"

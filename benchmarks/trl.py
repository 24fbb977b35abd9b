"""Responses per second of RLOO beside TRL's, on the same tiny GPT-NeoX, prompts, lengths and cores.

64 responses of 64 tokens a step, 8 to a prompt, one pass, Adam, a reward on token ids; both look at
π_ref (TRL for its KL in the reward, ours for its measures). TRL 1.16 generates with transformers in
one process. Ours goes through actor, reward service, queue and learner: in lockstep, and pipelined.
All take turns; each is timed from its second step on. That the losses agree on equal tensors is
tests/unit/test_trl.py's.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig

from actors import policy
from cluster import connection
from cluster.train import train
from configs.load import prepare

TURNS, UPDATES = 3, 30
RESPONSES, GROUP, TOKENS, PROMPT = 64, 8, 64, 8
VOCABULARY = 1024
SHAPE = GPTNeoXConfig(
    vocab_size=VOCABULARY, hidden_size=96, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=3, max_position_embeddings=128, hidden_dropout=0.0, attention_dropout=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
PIPELINED = ["replay.schedule=pipelined", "replay.max_age=3"]


def score(prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """The share of different tokens in a response."""
    return [len(set(response)) / max(1, len(response)) for response in responses]


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


def theirs(folder: Path) -> float:
    """TRL's responses per second."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return list(score([], completion_ids))

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    texts = [" ".join(f"w{t}" for t in row["prompt_ids"]) for row in rows]
    settings = RLOOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=RESPONSES, beta=0.05,
        num_generations=GROUP, max_completion_length=TOKENS, max_steps=UPDATES, use_cpu=True,
        learning_rate=1e-4, bf16=False, gradient_checkpointing=False, report_to="none",
        logging_steps=10**6, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=str(folder / "model"), args=settings,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[Clock()],
        reward_funcs=reward,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return RESPONSES * (len(times) - 1) / (times[-1] - times[0])


def ours(folder: Path, more: list[str]) -> float:
    """Our responses per second."""
    config = prepare("bandit_ppo", [
        f"run.dir={folder}/runs", f"policy.path={folder}/model", "prompts.source=jsonl",
        f"prompts.path={folder}/prompts.jsonl", "prompts.count=0", f"learner.updates={UPDATES}",
        f"rollout.responses_per_prompt={GROUP}", f"rollout.max_tokens={TOKENS}",
        f"replay.samples_per_round={RESPONSES}", f"learner.minibatch={RESPONSES}",
        "replay.inner_epochs=1", "objective.advantage=leave_one_out", "learner.lr=1e-4",
        "reward.kind=function", "reward.path=benchmarks.trl:score", "eval.every=0",
        "checkpoint.seconds=0", "learner.exact_kl=false", *more,
    ])  # fmt: skip
    summary = train(config, "bench-trl")
    if summary["status"] != "finished":
        raise RuntimeError(f"the run ended as {summary['status']}: {summary['failure']}")
    return float(RESPONSES * UPDATES / summary["train_seconds"])


def main(overrides: list[str]) -> None:
    """Print rates and ratios, with their spread, and write them. overrides: settings of ours."""
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder)
        with connection.connected(prepare("bandit", []).cluster):
            for turn in range(TURNS):
                row = {
                    "turn": turn,
                    "trl": theirs(folder),
                    "lockstep": ours(folder, overrides),
                    "pipelined": ours(folder, [*PIPELINED, *overrides]),
                }
                print("  ".join(f"{key} {value:.1f}" for key, value in row.items()), flush=True)
                rows.append(row)
    for name in ("lockstep", "pipelined"):
        ratios = [row[name] / row["trl"] for row in rows]
        print(
            f"{name}: responses/s over TRL's = {statistics.median(ratios):.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})"
        )
    target = Path("runs/bench")
    target.mkdir(parents=True, exist_ok=True)
    (target / "trl.json").write_text(json.dumps(rows, indent=2) + "\n")

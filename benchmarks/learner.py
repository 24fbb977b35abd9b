"""What the learner's step costs on varying lengths: padded, cut by tokens, and packed; and beside a
bare loop of transformers and torch on the same rollouts.

Prompts of 5 … 15 tokens, responses log-normal with mode 20 and at most 60, as in the length
problems; PPO on 64 rollouts a step. The learner's steps include its measures and DeepSpeed; π_ref's
log-probabilities are there already, as from a sample's second pass on. The bare loop pads to the
longest and takes the log-softmax of every position. All take turns in one process, on one thread;
ratios are of tokens (prompt and response, padding not counted) per second of its CPU time within a
turn, which other processes on the machine disturb less than they do a clock's.
"""

import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from actors.rollout import Rollouts, offsets
from benchmarks import results
from configs.load import prepare
from learner.batch import Padded, conditionals, pad, token_logps
from learner.engine import join, leave
from learner.learner import Learner
from learner.objectives import load
from learner.packing import cost, fed
from learner.replay.records import Batch, Held, index
from learner.signals import signals

TURNS = 15
GROUPS, MEMBERS = 16, 4
LONGEST, MODE, SIGMA = 60, 20.0, 0.6  # tokens, and the standard deviation of log length
MICRO_TOKENS = 1024
VOCABULARY = 2048
SHAPE = GPTNeoXConfig(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=128, hidden_dropout=0.0, attention_dropout=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
VARIANTS = {
    "padded": [],
    "padded, by tokens": [f"learner.micro_tokens={MICRO_TOKENS}"],
    "packed": ["learner.packing=true"],
    "packed, by tokens": ["learner.packing=true", f"learner.micro_tokens={MICRO_TOKENS}"],
}
PAIRS = [("packed", "padded"), ("padded, by tokens", "padded"), ("packed, by tokens", "padded"),
         ("padded", "bare loop"), ("packed", "bare loop")]  # fmt: skip


def rollouts() -> Rollouts:
    """A minibatch of the distribution above, its tokens and rewards at random."""
    random, n = np.random.default_rng(0), GROUPS * MEMBERS
    prompt_G = random.integers(5, 16, GROUPS)
    length_N = random.lognormal(np.log(MODE) + SIGMA**2, SIGMA, n).astype(np.int64)
    length_N = length_N.clip(1, LONGEST)
    tokens = int(length_N.sum())
    block = Rollouts(
        members=MEMBERS,
        position_G=np.arange(GROUPS),
        incarnation_G=np.zeros(GROUPS, dtype=np.int32),
        row_G=np.arange(GROUPS),
        prompt_offset_G1=offsets(prompt_G),
        prompt_P=random.integers(0, VOCABULARY, prompt_G.sum()).astype(np.int32),
        offset_N1=offsets(length_N),
        token_K=random.integers(0, VOCABULARY, tokens).astype(np.int32),
        logp_K=np.full(tokens, -np.log(VOCABULARY), dtype=np.float32),
        lineage_K=np.zeros(tokens, dtype=np.int16),
        step_K=np.zeros(tokens, dtype=np.int32),
        reward_N=random.normal(size=n).astype(np.float32),
        status_N=np.zeros(n, dtype=np.uint8),
        truncated_N=length_N == LONGEST,
        label_N=np.full(n, -1, dtype=np.int8),
        scorer_N=np.zeros(n, dtype=np.uint8),
    )
    block.derived["reference_logp_K"] = block.logp_K
    return block


def ours(block: Rollouts, overrides: list[str]) -> Callable[[], None]:
    """A step of a learner of these settings on the block."""
    learner = Learner(prepare("bandit_ppo", overrides), 0)
    held = [Held.of(block, group) for group in range(block.groups)]
    seen = index(held, [np.ones(block.members, dtype=np.int64)] * len(held), 0, False)
    batch = Batch(
        lineage=0, number=0, step=0, round=0, first=0, block=block, index=seen,
        round_rewards=block.reward_N, measures={}, last=False,
    )  # fmt: skip

    def step() -> None:
        record, _ = learner.consume(batch)
        assert record.stepped

    return step


def bare(block: Rollouts, path: str) -> Callable[[], None]:
    """The same update with one network, one optimizer and nothing around them."""
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, foreach=True)
    objective, settings = load("ppo"), prepare("bandit_ppo", []).objective

    def step() -> None:
        batch: Padded = pad(block)
        notes = signals(
            block.reward_N, block.label_N, block.status_N == 0, block.members, block.reward_N,
            settings, 0.0,
        )  # fmt: skip
        logp_NL = token_logps(conditionals(model, batch), batch)
        given = notes.loss_inputs(logp_NL, batch.mask_NL, batch.logp_NL)
        optimizer.zero_grad()
        (objective.loss(given, settings) / notes.count("rollout")).backward()
        optimizer.step()

    return step


def main(overrides: list[str]) -> None:
    """Print the rate of each, and ratios with their spread over the turns."""
    block = rollouts()
    total_N = block.length_N + np.repeat(np.diff(block.prompt_offset_G1), block.members)
    fed_N, tokens = fed(total_N), int(total_N.sum())
    padded, packed = (fed_N.sum() / cost(fed_N, packing) for packing in (False, True))
    print(f"{len(total_N)} rollouts, {tokens} tokens, fed in rows of {fed_N.max()}: padded "
          f"{padded:.0%} full, packed {packed:.0%} full")  # fmt: skip
    seconds = _measure(block, overrides)
    for name, taken in seconds.items():
        rates = sorted(tokens / x for x in taken)
        print(f"{name:>18}: {statistics.median(rates):7.0f} tokens/CPU s (from {rates[0]:.0f} to "
              f"{rates[-1]:.0f})")  # fmt: skip
    for one, other in PAIRS:
        faster = results.ratios(seconds[other], seconds[one])
        print(f"{one} / {other} = {results.spread(faster)}, {TURNS} turns")
    results.write("learner", seconds)


def _measure(block: Rollouts, overrides: list[str]) -> dict[str, list[float]]:
    """CPU seconds of each one's steps, turn by turn; the first two of each do not count."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join(0, 1, ("127.0.0.1", port), 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPE).save_pretrained(folder)
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text('{"prompt_ids": [1]}\n')
        n = GROUPS * MEMBERS
        common = [
            f"policy.path={folder}", "prompts.source=jsonl", f"prompts.path={prompts}",
            f"rollout.max_tokens={LONGEST}", f"rollout.responses_per_prompt={MEMBERS}",
            f"learner.minibatch={n}", f"replay.samples_per_round={n}", "learner.exact_kl=false",
            "learner.lr=1e-4", *overrides,
        ]  # fmt: skip
        steps = {name: ours(block, [*common, *own]) for name, own in VARIANTS.items()}
        steps["bare loop"] = bare(block, folder)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(TURNS + 2):
            for name, step in steps.items():
                started = time.process_time()
                step()
                seconds[name].append(time.process_time() - started)
    leave()
    return {name: taken[2:] for name, taken in seconds.items()}

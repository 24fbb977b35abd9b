"""The bandit's π_ref (Appendix I): a GPT-nano fitted to a histogram of clipped Cauchy draws.

Every response token is drawn independently of its prefix, so the fit has an exact target: the
histogram, at each prefix. The fit is a function of `BanditPolicyConfig` alone and is kept on disk;
seeds of a study share it.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors import policy
from configs.schema import BanditPolicyConfig, Config

FIT_LR = 0.01
MOST_STEPS = 1000
CHECK_EVERY = 50


def reference_histogram(bandit: BanditPolicyConfig) -> np.ndarray:
    """π_ref's token frequencies, [vocabulary] float64, summing to 1.

    `draws` samples of Cauchy(location, scale), clipped to (−1, 1), in `vocabulary` equal bins.
    """
    draws = np.random.default_rng(bandit.seed).standard_cauchy(bandit.draws)
    clipped = np.clip(bandit.location + bandit.scale * draws, -1.0, 1.0)
    counts, _ = np.histogram(clipped, bins=bandit.vocabulary, range=(-1.0, 1.0))
    return counts / counts.sum()


def initial_policy(config: Config) -> str:
    """Directory of the starting weights: `policy.path`, or the fitted bandit network's."""
    if config.policy.path:
        return config.policy.path
    bandit, length = config.policy.bandit, config.rollout.max_tokens
    shape = policy.bandit_architecture(bandit, length).to_json_string()
    identity = json.dumps([asdict(bandit), shape, torch.__version__], sort_keys=True)
    name = "bandit-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    root = Path(config.policy.cache_dir or "~/.cache/onpolicy").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            model, divergence = fit(bandit, length)
            staging = root / f"{name}.{os.getpid()}"
            model.save_pretrained(staging)
            (staging / "fit.json").write_text(json.dumps({"worst_nats": divergence}))
            staging.rename(root / name)
    return str(root / name)


def fit(bandit: BanditPolicyConfig, length: int) -> tuple[PreTrainedModel, float]:
    """A network whose next-token distribution is the histogram after every prefix.

    Returns it with KL(histogram ‖ network) in nats at the worst of 5,120 fresh prefixes. Raises
    RuntimeError where that does not come under `fit_tolerance`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(bandit.seed)
    target_V = torch.from_numpy(reference_histogram(bandit)).float()
    model = policy.build(policy.bandit_architecture(bandit, length))
    optimizer = torch.optim.Adam(model.parameters(), FIT_LR)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MOST_STEPS, 1e-5)
    worst = float("inf")
    for step in range(MOST_STEPS):
        divergence = divergence_from(model, target_V, length, 64).mean()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
        rate.step()
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            with torch.no_grad():
                worst = float(divergence_from(model, target_V, length, 512).max())
            if worst < bandit.fit_tolerance:
                break
    torch.set_num_threads(threads)
    if worst >= bandit.fit_tolerance:
        raise RuntimeError(f"the bandit's π_ref fits to {worst:.2g} nats, over fit_tolerance")
    return model.eval(), worst


def divergence_from(model: nn.Module, target_V: Tensor, length: int, prefixes: int) -> Tensor:
    """KL(histogram ‖ network) at each prefix of freshly drawn sequences, [prefixes, length]."""
    context = torch.randint(0, len(target_V), (prefixes, 1))
    tokens = torch.multinomial(target_V, prefixes * (length - 1), replacement=True)
    logits = model(torch.cat([context, tokens.view(prefixes, -1)], 1), use_cache=False).logits
    entropy = -(target_V * target_V.clamp_min(1e-12).log()).sum()
    return -(logits.log_softmax(-1) * target_V).sum(-1) - entropy

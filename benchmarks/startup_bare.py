"""What `bench startup` is measured beside: one process, from its start to its first update.

    python -m benchmarks.startup_bare

The same network, draws, reward and objective as preset `bandit`, in plain torch: no Ray, no queue,
no service, no DeepSpeed, no checks.
"""

import torch

from actors import policy
from actors.engine import Request
from actors.rollout import GroupId, Version
from actors.torch_engine import TorchEngine
from cluster import inputs
from configs.load import prepare
from learner.batch import conditionals, pad, token_logps
from learner.objectives import load as load_objective
from learner.signals import signals
from learner.stages.bandit import initial_policy
from reward_server.rewards import load as load_reward
from reward_server.rewards import score_safely


def main() -> None:
    """One round of rollouts, one step on its first minibatch."""
    torch.set_num_threads(1)
    config = prepare("bandit", [])
    path = initial_policy(config)
    model = policy.load_pretrained(config.policy, path, config.learner.precision)
    reference = policy.load_pretrained(config.policy, path, config.learner.precision).eval()
    optimizer = torch.optim.Adam(model.parameters(), config.learner.lr)
    engine, prompts = TorchEngine(config), inputs.prompts(config)
    engine.load(policy.flatten(model), Version(0, 0))
    places = range(config.groups_per_round)
    block = engine.generate([Request(GroupId(p, 0), prompts[p]) for p in places], "rollout")
    rollouts = range(len(block.reward_N))
    asked = [block.prompt(n // block.members).tolist() for n in rollouts]
    answers = [block.response(n).tolist() for n in rollouts]
    block.reward_N[:] = score_safely(load_reward(config.reward), asked, answers).reward
    batch, objective = pad(block), load_objective(config.objective.name)
    with torch.no_grad():
        reference_NL = token_logps(conditionals(reference, batch), batch)
    notes = signals(
        block.reward_N, block.label_N, block.status_N == 0, block.members, block.reward_N,
        config.objective, 0.0,
    )  # fmt: skip
    logp_NL = token_logps(conditionals(model, batch), batch)
    given = notes.loss_inputs(logp_NL, batch.mask_NL, batch.logp_NL, reference_NL)
    loss = objective.loss(given, config.objective) / max(1, notes.count(objective.traits.per))
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()

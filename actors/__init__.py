"""The policy that acts: the rollout record, engines, prompts, weight receiving, the Ray actor."""

"""What is trained before preference fine-tuning: the initial policy, reward models."""

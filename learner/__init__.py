"""What learns: the replay queue, the objectives, the stages, and the DeepSpeed engine."""

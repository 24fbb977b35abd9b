"""What comes before and after training: stages, their order, the judge."""

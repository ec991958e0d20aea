"""What trainings share: sharding, micro-batches, checkpoints and the loop over steps."""

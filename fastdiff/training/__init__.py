"""Training: recipes as typed data, engines, the loop, checkpoints."""

"""Training: ensembles that follow the model, exact gradients in constant memory, checkpoints."""

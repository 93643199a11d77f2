"""Gradients of losses: streamed over frames, of replay batches, and as a Jacobian."""

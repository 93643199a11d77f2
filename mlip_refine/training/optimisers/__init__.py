"""Optimisers of a training run: AdamW, and Gauss-Newton with a trust region."""

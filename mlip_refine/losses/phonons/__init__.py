"""Losses on phonons: Hessian-vector products and frequencies."""

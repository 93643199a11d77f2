"""Faster evaluation of the same model: exact kernels, compiled graphs, and the choice between them."""

"""The reweightable ensembles of a training run: sampling, mixtures of references, sharing between states."""

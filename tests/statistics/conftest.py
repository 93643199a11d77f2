"""Samples with known answers: Gaussian states and autoregressive series."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlip_refine.testing import count_bounds

type Draw = Callable[..., Tensor]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240611)


@pytest.fixture
def normal(generator: torch.Generator) -> Draw:
    """Draw standard normal float64 samples of the given shape."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture
def autoregressive(normal: Draw) -> Draw:
    """Draw unit-variance AR(1) series [n_series, n], whose exact g is (1 + rho) / (1 - rho)."""

    def draw(n_series: int, n: int, rho: float) -> Tensor:
        noise = normal(n, n_series) * (1.0 - rho**2) ** 0.5
        series = [normal(n_series)]
        for kick in noise[1:]:
            series.append(rho * series[-1] + kick)
        return torch.stack(series, dim=1)

    return draw


@pytest.fixture
def require_coverage() -> Callable[[int, int], None]:
    """Return a check of the number of 95 % intervals that hold the truth, of so many experiments.

    Errors that are estimated cover it in 93 to 97 % (measured with thousands of experiments); the rest is
    binomial.
    """

    def require(hits: int, experiments: int) -> None:
        low, high = count_bounds(experiments, 0.93)[0], count_bounds(experiments, 0.97)[1]
        assert low <= hits <= high, f"{hits} of {experiments}, expected {low} to {high}"

    return require


class Wells:
    """Harmonic wells ``u_k = k (x - c)^2 / 2`` in one dimension: ``f_k = ln(k) / 2`` and a constant."""

    def __init__(self, centres: list[float], stiffness: list[float]) -> None:
        self.centres = torch.tensor(centres, dtype=torch.float64)
        self.stiffness = torch.tensor(stiffness, dtype=torch.float64)

    @property
    def f_k(self) -> Tensor:
        f = 0.5 * torch.log(self.stiffness)
        return f - f[0]

    def place(self, k: int, unit: Tensor) -> Tensor:
        """Turn standard normal numbers into samples of well k."""
        return self.centres[k] + unit / self.stiffness[k].sqrt()

    def potentials(self, x: Tensor) -> Tensor:
        """Reduced potentials of every well at every sample [K, N]."""
        return 0.5 * self.stiffness[:, None] * (x - self.centres[:, None]) ** 2

    def work(self, x: Tensor) -> Tensor:
        """``u_1 - u_0`` of samples of any shape."""
        u = [0.5 * k * (x - c) ** 2 for k, c in zip(self.stiffness, self.centres, strict=True)]
        return u[1] - u[0]


@pytest.fixture
def pair() -> Wells:
    """Two wells of different width and place; exact difference ln(1.5) / 2."""
    return Wells([0.0, 0.8], [1.0, 1.5])


@pytest.fixture
def reversed_pair() -> Wells:
    """The same two wells, the other one first; exact difference -ln(1.5) / 2."""
    return Wells([0.8, 0.0], [1.5, 1.0])


@pytest.fixture
def ladder() -> Wells:
    """Five wells, each stiffer than the one before."""
    return Wells([0.0, 0.5, 1.0, 1.5, 2.0], [1.0, 1.3, 1.7, 2.2, 3.0])

"""Radial functions for edges alone: equal to MACE's, with all derivatives, and blind to the batch."""

import pytest
import torch
from mace.modules.radial import AgnesiTransform, PolynomialCutoff, ZBLBasis

from mlip_refine.potential.acceleration.kernels import RADIAL, envelope, install_kernels, integer_power

TABLE = torch.tensor([14, 22])


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def _edges(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    lengths = 1.0 + 4.0 * torch.rand(n, 1, generator=generator)
    attrs = torch.eye(2)[torch.randint(2, (9,), generator=generator)]
    return lengths, attrs, torch.randint(9, (2, n), generator=generator), TABLE


def _derivatives(function, lengths: torch.Tensor, order: int) -> list[torch.Tensor]:
    x = lengths.clone().requires_grad_()
    values = [function(x)]
    for _ in range(order):
        (slope,) = torch.autograd.grad(values[-1].sum(), x, create_graph=True)
        values.append(slope)
    return values


@pytest.mark.parametrize("exponent", range(1, 14))
def test_integer_powers(exponent):
    x = torch.linspace(-1.3, 1.3, 27)
    torch.testing.assert_close(integer_power(x, exponent), x**exponent, rtol=4e-15, atol=0)


@pytest.mark.parametrize("p", [1, 3, 5, 6, 10])
def test_the_cutoff_is_that_of_mace_to_its_third_derivative(p):
    stock = PolynomialCutoff(r_max=4.0, p=p)
    own = RADIAL[PolynomialCutoff](stock)
    lengths = torch.linspace(0.5, 4.6, 83)[:, None]
    for ours, theirs in zip(_derivatives(own, lengths, 3), _derivatives(stock, lengths, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * float(theirs.detach().abs().max()))


def test_the_cutoff_is_exactly_zero_from_its_end_on_with_all_derivatives():
    beyond = torch.tensor([4.0, 4.0 + 1e-12, 7.3, 90.0])[:, None]
    for values in _derivatives(lambda x: envelope(x, torch.tensor(4.0), 5), beyond, 3):
        assert not values.any()


@pytest.mark.parametrize("stock", [AgnesiTransform(), ZBLBasis(p=6)], ids=["Agnesi", "ZBL"])
def test_radial_parts_with_elements_are_those_of_mace(stock):
    stock = stock.double()
    own = RADIAL[type(stock)](stock)
    lengths, *rest = _edges(200)
    ours, theirs = (_derivatives(lambda x, f=f: f(x, *rest), lengths, 2) for f in (own, stock))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, reference, rtol=1e-11, atol=1e-12 * float(reference.detach().abs().max())
        )
    assert ours[0].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", RADIAL, ids=lambda kind: kind.__name__)
def test_an_edge_does_not_see_how_many_others_there_are(kind, dtype):
    """Values and slopes of 16 edges, bit for bit, at every place in a register and in the rest of a row."""
    stock = kind(r_max=5.0, p=5) if kind is PolynomialCutoff else kind()
    own = RADIAL[kind](stock.to(dtype))
    lengths, attrs, edges, table = _edges(64)
    edges[1] = torch.arange(64) % 9  # every energy of an atom has the same edges in the same order
    alone, seen = lengths[:16].to(dtype), []
    for before in range(48):
        x = torch.cat([lengths[16 : 16 + before].to(dtype), alone])
        index = torch.cat([torch.zeros(2, before, dtype=torch.long), edges[:, :16] % 8 + 1], dim=1)
        arguments = () if kind is PolynomialCutoff else (attrs.to(dtype), index, table)
        value, slope = _derivatives(lambda y, a=arguments: own(y, *a), x, 1)
        seen.append((value[1:] if kind is ZBLBasis else value[before:], slope[before:]))
    for value, slope in seen:
        assert torch.equal(value, seen[0][0])
        assert torch.equal(slope, seen[0][1])


def test_tables_of_elements_are_no_parameters_of_their_own(build):
    module = build("density")
    names = {name for name, _ in module.named_parameters()}
    install_kernels(module)
    assert {name for name, _ in module.named_parameters()} == names

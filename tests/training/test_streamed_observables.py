"""The streamed gradient of a loss that sees stresses, in the parameters of a real model."""

import pytest
import torch

from mlip_refine import testing
from mlip_refine.quantities import Measured
from mlip_refine.sampling import StatePoint
from mlip_refine.training.ensemble import Ensemble, Reference
from mlip_refine.training.streaming import (
    backpropagate,
    ensemble_losses,
    further_probes,
    probe_energies,
    wanted_probes,
)


@pytest.fixture
def pressed(titanium, hcp):
    """A pressure loss, and frames in its fixed cell of a model that has moved since they were drawn."""
    node = {
        "type": "pressure",
        "phase": "hcp",
        "temperature": 900,
        "lattice": [2.95, 4.68],
        "uncertainty": 0.2,
    }
    loss = testing.loss_of(node, hcp)
    noise = 0.1 * torch.randn(5, len(hcp), 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    positions = torch.from_numpy(hcp.positions) + noise
    cells = torch.from_numpy(hcp.cell.array).expand(5, 3, 3)
    structures = titanium.graphs.frames(positions, cells, hcp.numbers)
    point = StatePoint(loss.source.name, hcp, 900.0, 0.0, ensemble="nvt", cell_freedom="fixed")
    energy = titanium.energies(structures)
    reference = Reference(point, titanium.parameters(), "made", 5, 1.0, (positions[-1:], cells[-1:]))
    ensemble = Ensemble(
        point=point,
        references=(reference,),
        structures=structures,
        volume=torch.linalg.det(cells).abs(),
        energies=energy[None],
        shift=Measured(0.0, 0.0, "eV"),
        shift_influence=torch.zeros_like(energy),
        frames_per_draw=5,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in titanium.trainable_parameters().values():
            change = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 2e-4 * change)
    return loss, {loss.source: ensemble}


def test_the_gradient_of_a_pressure_equals_finite_differences(titanium, pressed):
    """Central differences along the largest component of four tensors, to 1e-4."""
    loss, ensembles = pressed
    (ensemble,) = ensembles.values()
    wanted = wanted_probes([loss])
    assert wanted == {loss.source: {"stress": 1}}

    def streamed():
        energies = probe_energies(titanium, ensembles)
        stress = further_probes(titanium, ensemble.structures, wanted[loss.source])
        probes = {loss.source: {"energy": energies[loss.source], **stress}}
        return ensemble_losses([loss], ensembles, probes)

    results, adjoints = streamed()
    assert adjoints[loss.source]["stress"].any()
    assert adjoints[loss.source]["energy"].any()
    assert results["pressure"].deviation.value > 1.0
    backpropagate(titanium, ensemble.structures, adjoints[loss.source])
    parameters = titanium.trainable_parameters()
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    for name in sorted(gradients, key=lambda name: float(gradients[name].abs().max()))[-4:]:
        flat, index = parameters[name].data.view(-1), int(gradients[name].abs().argmax())
        start, values = float(flat[index]), []
        step = 1e-5 * max(1.0, abs(start))
        for sign in (1, -1):
            flat[index] = start + sign * step
            values.append(float(streamed()[0]["pressure"].value.detach()))
        flat[index] = start
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float(gradients[name].view(-1)[index]), rel=1e-4), name

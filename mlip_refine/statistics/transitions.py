"""Where two phases coexist: the temperature at which their free-energy difference vanishes."""

import math

from mlip_refine.quantities import Measured

MIN_ENTROPY_SIGNAL = 3.0
"""ΔS that is known to no more standard errors than this carries no transition temperature."""

MAX_EXTRAPOLATION = 0.25
"""Part of T beyond which ΔG is not extrapolated linearly."""


def entropy_difference(temperature: float, delta_g: Measured, delta_h: Measured) -> Measured:
    """Return ΔS = (ΔH - ΔG)/T, in the unit of both per K.

    Args:
        temperature: Temperature T of both differences, K.
        delta_g: Free-energy difference.
        delta_h: Enthalpy difference, independent of it.
    """
    return (delta_h - delta_g).scaled(1 / temperature, f"{delta_g.unit}/K")


def transition_temperature(
    temperature: float | None, delta_g: Measured, delta_s: Measured
) -> tuple[Measured | None, str]:
    """Return where ΔG vanishes, extrapolated linearly: T* = T + ΔG/ΔS.

    Its error counts that ΔS = (ΔH - ΔG)/T contains ΔG, with cov(ΔG, ΔS) = -se(ΔG)²/T.

    Args:
        temperature: Temperature T at which ΔG holds, K. If it is not known, the result is the distance
            T* - T, and its error takes ΔG and ΔS as independent.
        delta_g: Free-energy difference ΔG.
        delta_s: Entropy difference ΔS, in the same unit per K (`entropy_difference`).

    Returns:
        T* in K and an empty note; or `None` and the reason for the refusal: ΔS is not known to
        `MIN_ENTROPY_SIGNAL` standard errors, or T* is further away than `MAX_EXTRAPOLATION` T.
    """
    refusal = "no transition temperature: "
    # Not "<=", so that an error which is not a number is refused.
    if not abs(delta_s.value) > MIN_ENTROPY_SIGNAL * delta_s.se:
        return None, f"{refusal}ΔS = {delta_s} is not known to {MIN_ENTROPY_SIGNAL:g} σ"
    shift = delta_g.value / delta_s.value
    if temperature is not None and abs(shift) > MAX_EXTRAPOLATION * temperature:
        return None, f"{refusal}it lies {shift:+.0f} K away, too far to extrapolate ΔG linearly"
    covariance = 0.0 if temperature is None else -(delta_g.se**2) / temperature
    variance = delta_g.se**2 + (shift * delta_s.se) ** 2 - 2 * shift * covariance
    se = math.sqrt(max(variance, 0.0)) / abs(delta_s.value)
    return Measured((temperature or 0.0) + shift, se, "K"), ""

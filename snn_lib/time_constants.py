"""Time constants: what an exponential of so many steps is to a filter.

A trace of the time constant tau loses the factor exp(-1 / tau) a step. The difference of two, slow
and fast, rises and falls.

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math


def decay_of(tau: float, name: str = "tau") -> float:
    """exp(-1 / tau), what is left of a trace after one step.

    Args:
        tau: the time constant, in steps.
        name: what the error calls it.

    Raises:
        ValueError: ``tau`` is not positive.
    """
    if not tau > 0:  # nan too
        raise ValueError(f"{name} is {tau}, expected a positive number of steps")
    return math.exp(-1.0 / tau)


def decays_of(tau_m: float, tau_s: float) -> tuple[float, float]:
    """p = exp(-1 / tau_m) and q = exp(-1 / tau_s) of a dual exponential.

    Args:
        tau_m: the slow time constant, in steps.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m.

    Raises:
        ValueError: the time constants are not in that order, or not finite.
    """
    _check_order(tau_m, tau_s)
    return decay_of(tau_m), decay_of(tau_s)


def peak_scale(tau_m: float, tau_s: float) -> float:
    """v0, which gives a difference of two exponentials the peak 1 in continuous time.

    v0 = eta^(eta / (eta - 1)) / (eta - 1),  eta = tau_m / tau_s

    Args:
        tau_m: the slow time constant, in steps.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m.

    Raises:
        ValueError: the time constants are not in that order, or not finite.
    """
    _check_order(tau_m, tau_s)
    eta = tau_m / tau_s
    return eta ** (eta / (eta - 1)) / (eta - 1)


def _check_order(tau_m: float, tau_s: float) -> None:
    if not 0 < tau_s < tau_m < math.inf:  # nan too
        raise ValueError(
            f"tau_m is {tau_m} and tau_s {tau_s}, expected 0 < tau_s < tau_m, both finite"
        )

"""Stability of IIR filters: the test for it, a stable filter close by, and a warning.

F[t] = sum_{p=1..P} alpha_p F[t-p] + ...

A filter is stable if all its poles, the roots of z^P - sum_p alpha_p z^(P-p), lie inside the unit
circle. If one lies outside, the output grows without bound. All functions here read only the
coefficients, ``(P, *shape)``, and treat every channel on its own.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from snn_lib.pytorch_private import is_transformed, is_watched

MARGIN = 1e-3
MARGINS = [MARGIN / 2**halvings for halvings in range(10)]
MAX_ORDER = 8  # beyond it, float32 and soon float64 cannot tell which filters are stable
OCTAL_DIGITS = 5  # digits, in base 8, of the factor that scales the poles of a filter
CHECKED = 97  # One in so many calls is checked on a GPU. It is prime, so all layers get their turn.
Array = TypeVar("Array", Tensor, np.ndarray)
UNSTABLE = "a filter's pole lies outside the unit circle"


def has_stable_poles(alpha: Array) -> Array:
    """Whether each channel's filter is stable, whatever the rounding.

    This is the step-down recursion of Schur and Cohn. A filter of order P is stable if its
    reflection coefficient k_P = alpha_P has a magnitude below 1 and if the filter of order P - 1
    with (alpha_p + k_P alpha_{P-p}) / (1 - k_P^2) is stable. On the unit circle
    |1 - sum_p alpha_p z^-p| is at least the product of all 1 - |k_p|. So the filter is certainly
    stable if this product is larger than the recursion's rounding error. The answer is false for
    unstable filters, for stable ones with clusters of poles that rounding could move outside, and
    if a coefficient is not finite. The error grows with the order: beyond ``MAX_ORDER`` the answer
    is false for many stable filters. ``alpha`` is a tensor or a NumPy array, which is faster.
    """
    kind = np.finfo(alpha.dtype) if isinstance(alpha, np.ndarray) else torch.finfo(alpha.dtype)
    doubt = 4 ** len(alpha) * kind.eps
    distance = 1.0 + 0.0 * alpha.sum(0)  # nan where a coefficient is not finite
    rows = list(alpha)
    while rows:
        *rows, k = rows
        distance = distance * (1.0 - abs(k)).clip(0.0)
        rows = [(a + k * b) / (1.0 - k * k) for a, b in zip(rows, reversed(rows), strict=True)]
    return distance > doubt


def poles_of(alpha: Tensor) -> Tensor:
    """The poles of each channel's filter, complex, ``(*shape, P)``, on the CPU.

    They are the eigenvalues of the recurrence's companion matrix, and infinite if a coefficient is
    not finite.
    """
    alpha = alpha.detach().cpu().double()
    order, *shape = alpha.shape
    finite = alpha.isfinite().all(0)
    companion = torch.zeros(*shape, order, order, dtype=torch.float64, device="cpu")
    if order:
        companion[..., 0, :] = torch.where(finite, alpha, 0.0).movedim(0, -1)
        companion[..., 1:, :-1] = torch.eye(order - 1, device="cpu")
    return torch.where(finite[..., None], torch.linalg.eigvals(companion), math.inf)


def stabilise(alpha: Tensor, margin: float) -> Tensor:
    """A stable filter close by for each channel; a stable one stays the same, bit for bit.

    The function never waits for a GPU, because what it does depends on no value.

    - Order 1: |alpha_1| <= 1 - m.
    - Order 2: |alpha_2| <= 1 - m and |alpha_1| <= 1 - alpha_2 - m, the triangle of all stable
      second-order filters, which includes those with complex poles.
    - Higher orders, and any order in a precision below float32: the poles have magnitudes below
      1 - m. Where they do not, alpha_p is clamped to the binomial coefficient P over p, which no
      stable filter exceeds, and all poles are scaled by one factor s, that is alpha_p by s^p. The
      function searches for the largest s for which the filter is stable as rounded to its dtype.

    Args:
        alpha: ``(P, *shape)``. Filters with infinite coefficients become stable as well; nan stays.
        margin: m, how far inside the stable set the filters stay, 0 < m < 1.

    Returns:
        ``(P, *shape)`` in the dtype of ``alpha``. Applied again, the function changes nothing.
    """
    order, bound = len(alpha), 1.0 - margin
    if order == 0:
        return alpha
    if order <= 2 and alpha.dtype in (torch.float32, torch.float64):
        last = alpha[1:].clamp(-bound, bound)  # alpha_2, or nothing
        limit = bound - last.sum(0)
        return torch.cat([alpha[:1].clamp(-limit, limit), last])

    exact = torch.float32 if alpha.device.type == "mps" else torch.float64  # MPS has no other
    bounded = torch.stack(
        [
            a.clamp(-math.comb(order, p), math.comb(order, p))
            for p, a in enumerate(alpha.to(exact), 1)
        ]
    )

    def scale(factor: Tensor) -> Tensor:
        """Every filter with its poles scaled by each of the factors, ``(P, factors, *shape)``."""
        powers = factor.expand(order, *factor.shape).cumprod(0)
        return (bounded[:, None] * powers).to(alpha.dtype)

    def fits(candidates: Tensor) -> Tensor:
        powers = torch.full_like(candidates, bound, dtype=exact).cumprod(0)
        return has_stable_poles(candidates.to(exact) / powers)

    # Each pass finds one more digit of s, to the base 8; with s = 0 every filter is stable.
    digits = torch.arange(1, 8, device=alpha.device, dtype=exact)
    digits = digits.view(-1, *[1] * (alpha.dim() - 1))
    factor = torch.zeros_like(bounded[:1])
    for place in range(1, OCTAL_DIGITS + 1):
        larger = factor + digits / 8**place
        factor = torch.where(fits(scale(larger)), larger, factor).amax(0, keepdim=True)
    return torch.where(fits(alpha), alpha, scale(factor)[:, 0])


def refuse_clusters(alpha: Tensor, given: Tensor) -> None:
    """Raises a ValueError if rounding might move the poles of a stable filter outside.

    In a cluster of P > 2 poles each is known to a multiple of the precision divided by the product
    of its distances from the others.

    Args:
        alpha: the filters' coefficients, ``(P, *shape)``.
        given: the same before they were rounded.
    """
    given = given[:, ~has_stable_poles(alpha.double())]
    poles = poles_of(given)
    blur = torch.zeros_like(poles.abs())
    if len(given) > 2:
        apart = poles[..., None] - poles[..., None, :] + torch.eye(len(given), device="cpu")
        sizes = len(given) * (1 + given.detach().cpu().double().abs().sum(0)[..., None])
        blur = sizes * torch.finfo(torch.float64).eps / apart.prod(-1).abs()
    if (poles.abs() - blur < 1 - MARGINS[-1]).all(-1).any():
        raise ValueError(
            "the poles of a filter are so close together that rounding might move them out of the "
            "unit circle: expected several filters of lower order, one after the other, or "
            'constraint="none"'
        )


def largest_margin(alpha: Tensor) -> float:
    """The largest margin of 1e-3, half of it, and so on, that leaves stable filters as they are.

    Raises:
        ValueError: a filter is too near the edge of the stable set for any of these margins.
    """
    inside = has_stable_poles(alpha.double())
    for margin in MARGINS:
        if torch.equal(stabilise(alpha, margin)[:, inside], alpha[:, inside]):
            return margin
    raise ValueError(
        "a filter is too near the edge of the stable set to stay as it is: expected shorter time "
        'constants, higher frequencies or constraint="none"'
    )


def round_decaying(*alpha: float | Tensor) -> list[Tensor]:
    """Rounds alpha_1, ... of filters that decay to the default dtype; returns them in float64.

    Raises:
        ValueError: a filter no longer decays once it is rounded.
    """
    dtype = torch.get_default_dtype()
    exact = {"dtype": torch.float64, "device": "cpu"}
    rounded = [torch.as_tensor(a, **exact).to(dtype).to(**exact) for a in alpha]
    check_decaying(*rounded)
    return rounded


def check_decaying(*alpha: Tensor) -> None:
    """Raises a ValueError unless filters of alpha_1, ..., rounded to the default dtype, decay."""
    if not has_stable_poles(torch.stack(torch.broadcast_tensors(*alpha))).all():
        dtype = torch.get_default_dtype()
        raise ValueError(
            "a time constant is too long, or a decay is not between -1 and 1: "
            f"in {dtype} its filter does not decay"
        )


def check_rounding(alpha: Tensor, dtype: torch.dtype) -> None:
    """Raises a ValueError if a stable filter, ``(P, *shape)``, is not stable in another dtype."""
    before, after = (tensor.cpu().double() for tensor in (alpha, alpha.to(dtype)))
    if (has_stable_poles(before) & ~has_stable_poles(after)).any():
        remedy = " and use torch.autocast" if alpha.dtype == torch.float32 else ""
        raise ValueError(
            f"a filter decays so slowly that, rounded to {dtype}, it does not decay: leave the "
            f'layer in {alpha.dtype}{remedy}, or build a synapse with constraint="stable"'
        )


def refuse_rounding(own: Tensor, loaded: Any, name: str, messages: list[str]) -> None:
    """Adds a message if a filter of ``loaded`` is stable, but not in the dtype of ``own``.

    Args:
        own: the layer's tensor.
        loaded: what a state dict holds for it, ``(P, *shape)`` if it is a tensor.
        name: the name in the state dict.
        messages: where the message is added.
    """
    if not isinstance(loaded, Tensor) or own.is_meta or loaded.is_meta or loaded.dtype == own.dtype:
        return
    try:
        check_rounding(loaded, own.dtype)
    except ValueError as error:
        messages.append(f"{name}: {error}")


def warn_if_learning_unstable(alpha: Tensor) -> None:
    """Warns, once in a process, if a filter that is to learn is unstable."""
    if not alpha.requires_grad or not torch.is_grad_enabled() or alpha.is_meta:
        return
    if not (torch.compiler.is_compiling() or is_transformed() or is_watched()):  # no value is known
        warn_if_unstable(alpha)


def warn_if_unstable(alpha: Tensor) -> None:
    """Warns, once in a process, if a pole lies outside the unit circle.

    On a CPU every call checks the coefficients. On another device only one in ``CHECKED`` calls
    does, because the check waits for the device.
    """
    if len(alpha) > MAX_ORDER:  # which nobody can tell
        return
    if alpha.device.type != "cpu" and (
        next(_calls) % CHECKED or (alpha.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    exact = alpha.detach().cpu().double()
    with np.errstate(all="ignore"):
        unsure = ~has_stable_poles(exact.numpy())
    if unsure.any() and (poles_of(exact[:, torch.from_numpy(unsure)]).abs() >= 1).any():
        _warn_of_instability()


@contextmanager
def without_warning() -> Iterator[None]:
    """The context without the warning, for a loop that reports unstable filters itself.

    After the context, the warning is given once again.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNSTABLE, RuntimeWarning)
        try:
            yield
        finally:
            _warn_of_instability.cache_clear()


_calls = count()


@cache
def _warn_of_instability() -> None:
    remedy = 'IIRSynapse(..., constraint="stable") keeps the poles inside'
    warnings.warn(
        f"{UNSTABLE}, so that its output may grow without bound; {remedy}",
        RuntimeWarning,
        stacklevel=2,
    )

"""First weights found on data, with which every layer fires and the last one answers well.

With PyTorch's first weights the deeper layers of a spiking network stay silent. Their currents are
far below the threshold, so no spike reaches the next layer, and no gradient either.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from snn_lib.cells import Cell, Recurrent, is_spiking
from snn_lib.containers import WEIGHTED, Weighted, is_weighted, tensors_in
from snn_lib.observing import bind_call, observe, observe_layers, output_among
from snn_lib.readout import Mean, within

BISECTIONS = 20
LARGEST_FACTOR = 1e12
SMALLEST_CURRENT = 1e-6  # beside a threshold of 1; float32 rounds less than a tenth of it away
PENALTIES = [10.0**exponent for exponent in range(-4, 3)]  # per feature
SCALES = [2.0 ** (exponent / 2) for exponent in range(-16, 17)]  # of logits


@torch.no_grad()
def fire_from_the_start(
    model: nn.Module, x: Any, rate: float = 0.05, lengths: Tensor | None = None
) -> dict[str, float]:
    """Scales every layer's weights so that its neurons fire at a given mean rate on a batch.

    The model runs twice, in evaluation mode. In the first run, the ``nn.Linear`` or convolution
    that ran last before each layer of neurons is scaled. A bisection finds the factor with which
    the neurons fire at the rate. The weights and the bias are multiplied by it, and the run goes on
    with the scaled current. Weights that come back (:class:`snn_lib.Recurrent`) stay as they are,
    and what comes back counts. The second run measures the rates. They are close to the one asked
    for, unless something between weights and neurons undoes the scale, such as a normalisation, or
    adds to the current, such as the shortcut of a residual block, or so much comes back that the
    neurons fire at another rate or not at all.

    Args:
        model: any module that contains neurons of this package. Each layer of neurons needs a
            weighted layer of its own before it.
        x: a batch of input as the model takes it: ``(T, B, *features)``, or a tuple of tensors.
        rate: the mean firing rate aimed at, in spikes per neuron and step, in (0, 1).
        lengths: if sequences are padded, their own steps, int64 ``(B,)``. The rates are those
            within them.

    Returns:
        The measured rate of every layer of neurons, by name.

    Raises:
        TypeError: ``x`` is not a tensor but a NumPy array, for example, or it is complex; or the
            rate is no number.
        ValueError: ``x`` is empty, or all its steps are padding; the rate lies outside (0, 1); a
            layer's current is not finite; its neurons fire less often with any multiple of it, or
            as often without one, or with the smallest one; no ``nn.Linear`` or convolution runs
            before the neurons; its weights are computed from others, by a parametrisation or
            pruning, or used at another place, too; ``torch.compile`` runs the model without
            telling; or neurons run several times in one run, for example in chunks. All weights
            then stay as they were.
    """
    if isinstance(rate, Tensor) and rate.dim():
        raise TypeError("rate is a tensor, expected a number; lengths are given by their name")
    for tensor in tensors_in(x):
        if tensor.is_complex():
            raise TypeError(f"x is {tensor.dtype}, expected real numbers")
        if tensor.numel() == 0:
            raise ValueError(f"x has shape {tuple(tensor.shape)}, expected steps and sequences")
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate is {rate}, expected spikes per neuron and step in (0, 1)")
    rates: dict[str, float] = {}
    ran: list[Weighted] = []  # the layers of weights since the last neurons
    scaled: set[str] = set()  # the layers of neurons whose weights have been scaled
    taken: set[Tensor] = set()  # the weights and biases of layers that are not to change any more

    def remember(name: str, layer: Weighted, given: dict[str, Any], output: Tensor) -> None:
        ran.append(layer)

    def scale(
        name: str, neuron: Cell | Recurrent, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if name in scaled:
            raise ValueError(
                f"the neurons of layer {name} run several times, in chunks, a loop or several "
                "places: give the network that runs all steps at once, and each place its own"
            )
        if not ran:
            raise ValueError(
                f"no nn.Linear or convolution of its own runs before the neurons of layer {name}, "
                "or torch.compile runs it unseen"
            )
        layer = ran[-1]
        if not _has_own_weights(layer):
            raise ValueError(
                f"the weights before the neurons of layer {name} are computed from others, by a "
                "parametrisation or pruning: scale first, then add it"
            )
        own = {parameter for parameter in (layer.weight, layer.bias) if parameter is not None}
        if own & taken:
            raise ValueError(
                f"the weights before the neurons of layer {name} are used at another place, too, "
                "whose rate would change with them: give each its own"
            )
        taken.update(own)
        call = bind_call(neuron, args, kwargs)
        x, current = next(iter(call.items()))
        factor = _factor(neuron, current, rate, name, lengths)
        for parameter in own:
            parameter.mul_(factor)
        torch.clear_autocast_cache()  # which holds the weights as they were
        scaled.add(name)
        ran.clear()
        return (), {**call, x: current * factor}

    def measure(name: str, neuron: nn.Module, given: dict[str, Any], output: Tensor) -> None:
        rates[name] = _mean_rate(output, lengths)

    layers = [m for m in model.modules() if isinstance(m, WEIGHTED)]
    recurrent = [m for m in model.modules() if isinstance(m, Recurrent)]
    parts = {part for m in recurrent for child in m.children() for part in child.modules()}
    taken.update(parameter for module in recurrent for parameter in module.weights.parameters())

    def is_before(module: nn.Module) -> bool:
        return is_weighted(module) and module not in parts

    with _evaluation(model), _unchanged_on_error(layers):
        with observe_layers(model, is_before, remember), ExitStack() as hooks:
            for name, neuron in model.named_modules():
                if (is_spiking(neuron) or neuron in recurrent) and neuron not in parts:
                    hook = neuron.register_forward_pre_hook(partial(scale, name), with_kwargs=True)
                    hooks.enter_context(hook)
            model(x)
        with observe_layers(model, is_spiking, measure):
            model(x)
    return rates


@torch.no_grad()
def answer_from_the_start(
    model: nn.Module,
    layer: nn.Linear,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
) -> Tensor:
    """Sets the last layer by a ridge regression of the targets on the layer's input.

    The mean of the layer's output over time is the answer. The penalty of the regression is the one
    with which each sequence is predicted best from all the others (leave-one-out).

    If the targets are numbers, the answers predict them. If they are classes, the answers are
    logits: they predict a positive number for the class of a sequence, and its negative for all
    other classes. The number is chosen so that the softmax makes the right classes most probable
    for sequences that were left out of the fit. So the softmax of an answer says how sure it is.

    Args:
        model: any module; it runs in evaluation mode.
        layer: the last layer of the model, with a bias. The mean of its output over time is the
            answer. A ``forward`` of your own in its class has to compute what ``nn.Linear`` does.
        batches: the training data: inputs ``(T, B, *features)``, targets and ``lengths``, int64
            ``(B,)``, or ``None`` if every sequence has T steps. The targets are class numbers,
            int64 ``(B,)``, or numbers in floating point, ``(B, outputs)``.

    Returns:
        The answers to all samples of the batches, each from a fit without this sample: float64
        ``(samples, outputs)`` on the CPU.

    Raises:
        ValueError: the layer is no ``nn.Linear``, is not given all steps, or runs several times for
            a batch, for example in chunks, or not at all; ``torch.compile`` runs the model; there
            are no batches; or as :func:`fit_readout`.
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"the last layer is a {type(layer).__name__}, expected an nn.Linear")
    inputs: list[Tensor] = []
    features, targets = [], []

    def remember(given: dict[str, Any], output: Tensor) -> None:
        inputs.append(next(iter(given.values())))

    with _evaluation(model), observe(layer, remember):
        for x, y, lengths in batches:
            inputs.clear()
            model(x)
            if len(inputs) != 1:
                raise ValueError(
                    f"the last layer runs {len(inputs)} times for a batch, expected once: give a "
                    "layer of this network, and the network that runs all steps at once and is not "
                    "compiled"
                )
            if inputs[0].dim() != 3:
                raise ValueError(
                    f"the last layer is given the shape {tuple(inputs[0].shape)}, expected all "
                    "steps, (T, B, inputs)"
                )
            features.append(Mean()(inputs[0], lengths))
            targets.append(y.clone())  # a caller may write the next batch into it
    if not features:
        raise ValueError("there are no batches to answer")
    return fit_readout(layer, torch.cat(features), torch.cat(targets))


@torch.no_grad()
def fit_readout(layer: nn.Linear, features: Tensor, targets: Tensor) -> Tensor:
    """Sets a linear layer by a ridge regression, as :func:`answer_from_the_start` describes.

    Args:
        layer: with a bias.
        features: its input, ``(samples, inputs)``.
        targets: class numbers ``(samples,)``, or numbers ``(samples, outputs)``.

    Returns:
        The answers that :func:`answer_from_the_start` returns.

    Raises:
        ValueError: the layer has no bias, its weights are computed from others, by a
            parametrisation or pruning, there are fewer than two samples, a feature or target is
            not finite, or the targets have another shape or are no classes of the layer.
    """
    if layer.bias is None:
        raise ValueError("the last layer has no bias: build it with one")
    if not _has_own_weights(layer):
        raise ValueError(
            "the weights of the last layer are computed from others, by a parametrisation or "
            "pruning: set them first, then add it"
        )
    numbers = targets.is_floating_point()
    expected = (len(features), layer.out_features) if numbers else (len(features),)
    if targets.shape != expected:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} in {targets.dtype}, expected {expected}"
        )
    if not (features.isfinite().all() and targets.isfinite().all()):
        raise ValueError("the features or the targets are not finite")
    if len(features) < 2:
        raise ValueError(f"the number of samples is {len(features)}, expected two or more")
    scale = 1.0
    if numbers:
        fit = ridge_regression(features, targets)
    else:
        classes = targets.long()
        if not 0 <= classes.min() <= classes.max() < layer.out_features:
            raise ValueError(
                f"there are classes from {classes.min()} to {classes.max()}, expected them from 0 "
                f"on, and below the layer's {layer.out_features} outputs"
            )
        fit = ridge_regression(features, 2.0 * one_hot(classes, layer.out_features) - 1.0)
        scale = scale_of_logits(fit.leave_one_out, classes.cpu())
    layer.weight.copy_(scale * fit.weight)
    layer.bias.copy_(scale * fit.bias)
    torch.clear_autocast_cache()  # which holds the weights as they were
    return scale * fit.leave_one_out


class RidgeRegression(NamedTuple):
    """What a ridge regression finds, in float64 and on the CPU.

    Attributes:
        weight, bias: ``(outputs, inputs)`` and ``(outputs,)``, for features that are not
            standardised.
        leave_one_out: what a fit without a sample predicts for it, ``(samples, outputs)``.
    """

    weight: Tensor
    bias: Tensor
    leave_one_out: Tensor


def ridge_regression(x: Tensor, y: Tensor) -> RidgeRegression:
    """The weights and the bias that predict ``y`` from ``x``, with the best of some penalties.

    Features are standardised first, and y is centred. With Z = U S V^T for the features and the
    penalty c, the fit of y is H y, where H = U S^2 / (S^2 + c) U^T. A fit without sample i misses
    this sample by (y_i - (H y)_i) / (1 - h_i), where h_i is H_ii + 1 / n; 1 / n is for the mean.

    Args:
        x: features ``(samples, inputs)``, more or fewer than samples.
        y: targets ``(samples, outputs)``, of two samples or more.

    It is computed in float64, because 1 - h_i is as small as float32's rounding if there are as
    many features as samples, and on the CPU, because not every device has float64.
    """
    x, y = (tensor.cpu().double() for tensor in (x, y))
    mean, deviation, centre = x.mean(0), x.std(0, correction=0), y.mean(0)
    # A feature that is the same in all samples, such as a silent neuron's rate, is not scaled. Its
    # deviation is at most float32's rounding.
    deviation = torch.where(deviation > 1e-5 * mean.abs(), deviation, 1.0)
    u, s, vt = torch.linalg.svd((x - mean) / deviation, full_matrices=False)
    power, along = s.square(), u.T @ (y - centre)

    def leave_one_out_error(penalty: float) -> Tensor:
        kept = power / (power + penalty)
        leverage = u.square() @ kept + 1 / len(x)
        residual = y - centre - u @ (kept[:, None] * along)
        return residual / (1 - leverage)[:, None]

    penalties = (share * x.shape[1] for share in PENALTIES)
    penalty = min(penalties, key=lambda one: leave_one_out_error(one).square().mean().item())
    weight = ((s / (power + penalty))[:, None] * along).T @ vt / deviation
    return RidgeRegression(weight, centre - weight @ mean, y - leave_one_out_error(penalty))


def scale_of_logits(predicted: Tensor, classes: Tensor) -> float:
    """The factor of the predictions with which, as logits, they make the classes most probable.

    Predictions are float64 ``(samples, classes)``, and classes int64 ``(samples,)``.

    If all predictions are right, the largest factor would always be best. So the targets are
    smoothed as if one sample more were there, and its prediction were wrong.
    """
    smoothing = 1 / (len(classes) + 1)

    def surprise(scale: float) -> float:
        return cross_entropy(scale * predicted, classes, label_smoothing=smoothing).item()

    return min(SCALES, key=surprise)


def _has_own_weights(layer: Weighted) -> bool:
    """Whether weight and bias are parameters; computed ones would be set in vain."""
    own = layer.weight, layer.bias
    return all(tensor is None or isinstance(tensor, nn.Parameter) for tensor in own)


def _mean_rate(spikes: Tensor, lengths: Tensor | None) -> float:
    """Spikes per neuron and step of ``(T, B, *features)``, within sequences of these lengths."""
    fired = spikes.ne(0).float()
    if lengths is None:
        return fired.mean().item()
    own = within(fired, lengths).expand_as(fired)
    if not own.any():
        raise ValueError("all lengths are 0, expected steps that are not padding")
    return ((fired * own).sum() / own.sum()).item()


def _factor(
    neuron: Cell | Recurrent, current: Tensor, rate: float, name: str, lengths: Tensor | None
) -> float:
    """The factor by which a current has to be multiplied for a mean firing rate."""
    if not current.isfinite().all():
        raise ValueError(f"the current of layer {name} is not finite on this batch")

    def rate_with(factor: float) -> float:
        result = neuron.forward(current * factor)  # without its hooks, one of which asks
        return _mean_rate(output_among(result), lengths)

    if rate_with(0.0) >= rate:
        raise ValueError(
            f"layer {name} cannot be made to fire at {rate}: it fires as often without any current"
        )
    high, largest = 1.0, current.abs().max().item()
    while rate_with(high) >= rate:
        high /= 2.0
        if high * largest < SMALLEST_CURRENT:
            raise ValueError(
                f"layer {name} cannot be made to fire at {rate}: it fires as often with "
                f"currents of {SMALLEST_CURRENT:g}"
            )
    while rate_with(high) < rate:
        high *= 2.0
        if high > LARGEST_FACTOR:
            raise ValueError(
                f"layer {name} cannot be made to fire at {rate}: it fires less often even with "
                f"{LARGEST_FACTOR:g} times its current, which may be too seldom positive"
            )
    low = high / 2.0  # is too little, and high is enough
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rate_with(middle) < rate else (low, middle)
    return high


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The context in which a model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _unchanged_on_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The context that restores the layers' parameters if an error leaves it."""
    before = [(p, p.clone()) for layer in layers for p in layer.parameters()]
    try:
        yield
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        torch.clear_autocast_cache()
        raise

"""First weights that are found on data: every layer fires, and the last one answers already.

With PyTorch's first weights the deeper layers of a spiking network stay silent: their currents are
far below the threshold, no spike comes through, and no gradient either.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snn_lib.containers import bind_call
from snn_lib.functional import spiking_neuron
from snn_lib.neurons import SpikingNeuron
from snn_lib.readout import Mean

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BISECTIONS = 20
PENALTIES = [10.0**exponent for exponent in range(-4, 3)]  # a feature, to choose from


@torch.no_grad()
def fire_from_the_start(model: nn.Module, x: Tensor, rate: float = 0.05) -> dict[str, float]:
    """Scales every layer's weights so that its neurons fire at a given mean rate on a batch.

    The model runs twice. When a layer of neurons is reached, the weights (and the bias) of the
    ``nn.Linear`` or convolution that ran last are multiplied by the factor at which these neurons
    fire at the rate, found by bisection, and the run goes on with the current so scaled. The second
    run measures what came of it: close to the rate, but not where something between weights and
    neurons undoes the scale, such as a normalisation.

    Args:
        model: any module with neurons of this package inside; what drives each of them is a
            weighted layer of its own.
        x: a batch of real input, such as ``(T, B, *features)``, as the model takes it.
        rate: the mean firing rate aimed at, in spikes per neuron and step, in (0, 1).

    Returns:
        The rate of every layer of neurons by name, as the second run found it.

    Raises:
        ValueError: the rate is none, a layer's current is zero or negative throughout, no
            ``nn.Linear`` or convolution ran before the neurons, its weights are computed from
            others (a parametrisation, pruning), or neurons run several times in one run, in chunks
            say.
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate is {rate}, expected spikes per neuron and step in (0, 1)")
    found: dict[str, float] = {}
    weighted: list[nn.Module] = []

    def remember(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        weighted.append(module)

    def scale(name: str):
        def before(neuron: SpikingNeuron, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if name in found:
                raise ValueError(
                    f"the neurons of layer {name} run several times, in chunks or a loop: give the "
                    "network that runs all steps at once"
                )
            if not weighted:
                raise ValueError(
                    f"no nn.Linear or convolution runs before the neurons of layer {name}"
                )
            layer = weighted.pop()
            weighted.clear()
            if not isinstance(layer.weight, nn.Parameter):
                raise ValueError(
                    f"the weights before the neurons of layer {name} are computed from others, by "
                    "a parametrisation or pruning: scale first, then add it"
                )
            given = bind_call(neuron, args, kwargs)
            factor = _factor(neuron, given["current"], rate, name)
            found[name] = rate
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter.mul_(factor)
            return (), {**given, "current": given["current"] * factor}

        return before

    def measure(name: str):
        def after(neuron: SpikingNeuron, inputs: tuple, output: tuple) -> None:
            found[name] = output[0].ne(0).float().mean().item()

        return after

    neurons = {n: m for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    hooks = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, WEIGHTED)]
    hooks += [m.register_forward_pre_hook(scale(n), with_kwargs=True) for n, m in neurons.items()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    hooks = [m.register_forward_hook(measure(n)) for n, m in neurons.items()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def answer_from_the_start(
    model: nn.Module,
    layer: nn.Linear,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    scale: float = 1.0,
) -> None:
    """Solves a classifier's last layer: ridge regression of the classes on what the layer is given.

    Averaged over time, the layer's output is then as near as the penalty allows to ``scale`` for a
    sequence's own class, and to its negative for all others. The penalty is the one with which
    sequences are predicted best by all the others (left out one by one, which ridge regression
    knows in closed form).

    Args:
        model: any module; it is run in evaluation mode, and is in it afterwards.
        layer: the last of the model, with a bias; its output's mean over time is the answer.
        batches: the training data: inputs ``(T, B, *features)``, class numbers ``(B,)`` and
            ``lengths``, int64 ``(B,)``, or ``None`` if every sequence has T steps.
        scale: of the answers; logits of a few tell classes apart.

    Raises:
        ValueError: the layer does not run once for a batch, but several times, in chunks say.
    """
    given: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    features, labels = [], []
    model.eval()
    try:
        for x, y, lengths in batches:
            given.clear()
            model(x)
            if len(given) != 1:
                raise ValueError(
                    f"the last layer runs {len(given)} times for a batch, expected once: give the "
                    "network that runs all steps at once"
                )
            features.append(Mean()(given[0], lengths))
            labels.append(y)
    finally:
        hook.remove()
    exact = {"device": "cpu", "dtype": torch.float64}  # not every device has it
    classes = nn.functional.one_hot(torch.cat(labels), layer.out_features).to(**exact)
    weight, bias = ridge_regression(torch.cat(features).to(**exact), 2.0 * classes - 1.0)
    layer.weight.copy_(scale * weight)
    layer.bias.copy_(scale * bias)


def ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the bias that predict ``y`` from ``x``, with the best of some penalties.

    Features are standardised first. With Z = U S V^T and the penalty c, the fit of centred y is
    H y, H = U S^2 / (S^2 + c) U^T; left out, sample i is missed by (y_i - (H y)_i) / (1 - h_i),
    where h_i is that diagonal element of H, and 1 / n more for the mean.

    Args:
        x: features ``(samples, inputs)``.
        y: targets ``(samples, outputs)``.

    Returns:
        Weights ``(outputs, inputs)`` and bias ``(outputs,)``, for ``x`` as it is.
    """
    mean, deviation, centre = x.mean(0), x.std(0, correction=0), y.mean(0)
    # What all samples share, a silent neuron's rate say, differs by float32's rounding at most.
    deviation = torch.where(deviation > 1e-5 * mean.abs(), deviation, 1.0)
    u, s, vt = torch.linalg.svd((x - mean) / deviation, full_matrices=False)
    power, along = s.square(), u.T @ (y - centre)

    def error_left_out(penalty: float) -> float:
        kept = power / (power + penalty)
        leverage = u.square() @ kept + 1 / len(x)
        residual = y - centre - u @ (kept[:, None] * along)
        return (residual / (1 - leverage)[:, None]).square().mean().item()

    penalty = min((share * x.shape[1] for share in PENALTIES), key=error_left_out)
    weight = ((s / (power + penalty))[:, None] * along).T @ vt / deviation
    return weight, centre - weight @ mean


def _factor(neuron: SpikingNeuron, current: Tensor, rate: float, name: str) -> float:
    """By what to multiply a current for a mean firing rate."""

    def fired(factor: float) -> float:
        spikes, _ = spiking_neuron(
            current * factor, neuron.reset_decay, neuron.reset_strength, neuron.membrane_decay
        )
        return spikes.mean().item()

    low, high = 0.0, 1.0
    while fired(high) < rate:
        low, high = high, 2.0 * high
        if high > 1e12:
            raise ValueError(
                f"layer {name} cannot be made to fire at {rate}: its current is hardly ever "
                "positive on this batch"
            )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if fired(middle) < rate else (low, middle)
    return high

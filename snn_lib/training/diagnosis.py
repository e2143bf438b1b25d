"""Finds out what broke a run, and what may break it soon: numbers, layers, filters."""

import contextlib
import traceback
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from snn_lib.cells import IIRSynapse
from snn_lib.errors import RunError, SettingsError, one_line, out_of_memory
from snn_lib.training.checkpoints import learned, not_finite

PATIENCE = 25  # batches between two checks on a device other than the CPU
STABLE = 'constraint="stable" in the layer (hyperparameters.constraint=stable in our scripts)'
REMEDY = (
    f"Start again with a lower learning rate, optimizer.gradient_clipping=1 or {STABLE}. If the "
    "run has a last checkpoint, that is from before this happened: resume it with "
    "optimizer.gradient_clipping=1, or give it as first_weights"
)


@contextlib.contextmanager
def blaming(part: str) -> Iterator[None]:
    """A context in which a layer's refusal becomes one line about ``part``, such as the model.

    Layers check what only they know, for example that float32 can hold a filter of ``tau_m`` steps.
    An error in the user's own code passes through unchanged.

    Raises:
        SettingsError: a layer of this library or of PyTorch refuses a value, or the layers do not
            fit into the memory.
    """
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        package = frame.f_globals["__name__"].partition(".")[0]
        if out_of_memory(error):
            problem = "the model does not fit into the memory, make its layers smaller"
        elif isinstance(error, ValueError) and package in ("snn_lib", "torch"):
            problem = f"{part}: {one_line(error)}"
        else:
            raise
        raise SettingsError(problem) from None


class FiniteCheck:
    """Checks that loss and gradient of every batch are finite, without waiting for the device.

    On a CPU, each batch is checked before the optimiser takes its step. Checking makes the CPU wait
    for any other device. So such a device remembers the first batch that was not finite, and is
    asked for it once in ``PATIENCE`` batches.

    The error names the model's weights, gradients and synapses that are not finite.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.patience = 1 if device.type == "cpu" else PATIENCE
        self.watched = 0
        self.first_broken = torch.zeros(4, device=device)  # epoch, batch, loss, gradient's norm

    def watch(self, epoch: int, batch: int, loss: Tensor, norm: Tensor) -> None:
        """Notes whether a batch is finite; epochs and batches count from 1.

        Raises:
            RunError: the batch is not finite, or, on a device other than the CPU, an earlier one.
        """
        here = {"device": self.first_broken.device, "dtype": torch.float32}
        loss, norm = loss.detach().to(**here), norm.detach().to(**here)
        where = [torch.full_like(loss, number) for number in (epoch, batch)]
        broken = ~torch.isfinite(loss + norm) & (self.first_broken[0] == 0)
        now = torch.stack([*where, loss, norm])
        self.first_broken = torch.where(broken, now, self.first_broken)
        self.watched += 1
        if self.watched % self.patience == 0:
            self.check()

    def check(self) -> None:
        """Asks the device for the first batch that was not finite.

        Raises:
            RunError: a batch was not finite; the message says which, and what to change.
        """
        epoch, batch, loss, norm = self.first_broken.tolist()
        if epoch:
            raise RunError(
                f"epoch {epoch:.0f}, batch {batch:.0f}: the loss is {loss:g} and the gradient's "
                f"norm {norm:g} ({self._cause(loss)}){self._widest_filter()}. {REMEDY}"
            )

    def check_weights(self, epoch: int) -> None:
        """Checks the weights after the last step, before they are used or saved.

        Raises:
            RunError: one of them, or the loss or gradient of a batch, is not finite.
        """
        self.check()
        broken = not_finite(learned(self.model))
        if broken:
            raise RunError(f"epoch {epoch}: {broken} not finite. {REMEDY}")

    def _cause(self, loss: float) -> str:
        weights = dict(self.model.named_parameters())
        gradients = {f"gradient of {k}": p.grad for k, p in weights.items() if p.grad is not None}
        broken = not_finite({**weights, **gradients})
        if broken:
            return f"not finite: {broken}"
        if not torch.isfinite(torch.tensor(loss)):
            return "not finite: the loss alone"
        # Every gradient is finite, but the sum of their squares is not.
        largest = max(gradients, key=lambda name: gradients[name].abs().max().item())
        return f"the largest is {gradients[largest].abs().max().item():g}, in the {largest}"

    def _widest_filter(self) -> str:
        radii = {
            name: synapse.pole_radius()
            for name, synapse in synapses(self.model).items()
            if torch.isfinite(synapse.alpha).all()
        }
        if not radii:
            return ""
        widest = max(radii, key=lambda name: radii[name])
        return f"; the largest pole radius is {radii[widest]:.4f}, in layer {widest}"


def synapses(model: nn.Module) -> dict[str, IIRSynapse]:
    """The synapse layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, IIRSynapse)}


def troubled_layers(
    rates: Mapping[str, float], radii: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    """Yields a key and a line for each layer that is silent, saturated or unstable.

    ``rates`` are firing rates in spikes per neuron and step, ``radii`` the filters' pole radii.
    """
    every = ", ".join(f"{name} {rate:.4f}" for name, rate in rates.items())
    for name, rate in rates.items():
        if rate == 0 or rate > 0.95:
            key = f"layer {name} {'is silent' if rate == 0 else 'fires at almost every step'}"
            yield key, f"{key}; firing rates, in spikes per neuron and step: {every}"
    for name, radius in radii.items():
        if radius >= 1:
            yield (
                f"layer {name} is unstable",
                f"a filter of layer {name} is unstable, its pole radius is {radius:.4f}; "
                f"{STABLE} prevents that",
            )

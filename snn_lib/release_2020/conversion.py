"""Turns checkpoints of the authors' 2020 release into this project's.

    python -m snn_lib.checkpoints convert IN OUT --model snn_mlp_1

The three networks of that release are chains of synapses ``axon1``, ``axon2``, ... and neurons
``snn1``, ``snn2``, ..., which are called ``dense1``, ``dense2``, ... in the associative memory.
Here they are a ``Sequential`` with a synapse, an ``nn.Linear`` and neurons for each pair. OUT can
be used for ``--test``, and its weights for work of your own. It does not hold the state of the
optimiser, which belongs to other tensors.
"""

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from snn_lib.errors import require
from snn_lib.release_2020.snn_layers import (
    dual_exp_iir_layer,
    first_order_low_pass_layer,
    neuron_layer,
)
from snn_lib.training.checkpoints import load_checkpoint, load_weights, save_checkpoint
from snn_lib.training.command_line import Parser, exit_with

# The kind of each model's synapses, its number of inputs, and the number of neurons of its layers.
MODELS = {
    "snn_mlp_1": ("dual_exp", (784, 500, 500, 10)),
    "snn_mlp_2": ("low_pass", (784, 500, 500, 10)),
    "associative_memory": ("dual_exp", (300, 500, 200, 500, 300)),
}


def network_2020(
    synapse: str, sizes: Sequence[int], bias: bool = True, membrane_filter: bool = False
) -> nn.ModuleDict:
    """The layers of a 2020 network, with the names and state-dict keys of the release.

    Their time constants are placeholders, which a checkpoint overwrites.
    """
    layers = nn.ModuleDict()
    for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        layers[f"axon{number}"] = (
            dual_exp_iir_layer((inputs,), 1, 1, 4, 1, True)
            if synapse == "dual_exp"
            else first_order_low_pass_layer((inputs,), 1, 1, 4, True)
        )
        layers[f"snn{number}"] = neuron_layer(inputs, outputs, 1, 1, 4, bias, membrane_filter)
    return layers


def native_state_dict(layers: Any) -> dict[str, Tensor]:
    """The parameters of a :func:`network_2020` as the state dict of this project's model."""
    state = {}
    for number in range(len(layers) // 2):
        axon, cell = layers[f"axon{number + 1}"], layers[f"snn{number + 1}"].neuron_cell
        filters = axon._cell
        synapse, weights, neurons = (f"layers.{3 * number + index}" for index in range(3))
        if isinstance(axon, dual_exp_iir_layer):
            state[f"{synapse}.alpha"] = torch.stack([filters.alpha_1, filters.alpha_2])
            state[f"{synapse}.beta"] = filters.beta_1[None]
        else:
            state[f"{synapse}.alpha"] = filters.alpha_1[None]
            state[f"{synapse}.beta"] = torch.ones_like(filters.alpha_1)[None]
        for name, value in cell.weight.named_parameters():
            state[f"{weights}.{name}"] = value
        for name in ("reset_decay", "reset_strength", "membrane_decay"):
            state[f"{neurons}.{name}"] = getattr(cell, name)
    return {name: value.detach().clone() for name, value in state.items()}


def convert(source: Path, target: Path, model: str, membrane_filter: bool = False) -> list[str]:
    """Reads a 2020 checkpoint of ``model``, a key of ``MODELS``, and writes this project's.

    A 2020 checkpoint does not say whether its model was trained with the membrane filter, so
    ``membrane_filter`` has to.

    Returns:
        The command line with which the model's script tests it. Filters are not moved into the
        stable region: those of 2020 may have left it.

    Raises:
        InputError: ``source`` cannot be read or belongs to another model, or is ``target``.
        RunError: ``target`` cannot be written.
    """
    checkpoint = load_checkpoint(source)
    require(
        not (target.exists() and target.samefile(source)),
        f"{target} is the checkpoint that is read, of which a part is not converted: name another "
        "file",
    )
    checkpoint["snn_state_dict"] = {
        # The associative memory's name of neurons, and the low pass as the first version wrote it.
        str(key).replace("dense", "snn").replace("firsr_order", "first_order"): value
        for key, value in checkpoint["snn_state_dict"].items()
        if not str(key).startswith("output_filter.")  # which no weights follow
    }
    synapse, sizes = MODELS[model]
    bias = "snn1.neuron_cell.weight.bias" in checkpoint["snn_state_dict"]
    layers = network_2020(synapse, sizes, bias, membrane_filter)
    load_weights(layers, checkpoint)
    # Without a configuration of its own, the script's YAML is that of the model.
    converted = {"snn_state_dict": native_state_dict(layers)}
    if isinstance(checkpoint.get("epoch"), int):
        converted["epoch"] = checkpoint["epoch"]
    save_checkpoint(target, converted)
    has_other_filters = model == "associative_memory"  # in this project's own settings
    config_file = ["--config_file", f"{model}_2020.yaml"] if has_other_filters else []
    settings = ["constraint=none", *([] if bias else ["train_bias=false"])]
    overrides = [f"test_checkpoint_path={target}", *(f"hyperparameters.{one}" for one in settings)]
    return ["python", f"{model}.py", "--test", *config_file, *overrides]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command ``python -m snn_lib.checkpoints``; exits with the code of the outcome."""
    parser = Parser(prog="python -m snn_lib.checkpoints", description="Works on checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="read a checkpoint of the 2020 release")
    command.add_argument("source", type=Path, metavar="IN", help="the checkpoint of that release")
    command.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    command.add_argument("--model", choices=MODELS, required=True)
    command.add_argument(
        "--membrane_filter",
        action="store_true",
        help="the model was trained with membrane_filter on, which the checkpoint does not say",
    )

    def work() -> int:
        options = parser.parse_args(arguments)
        command = shlex.join(convert(**vars(options)))
        print(f"wrote {options.target}; test it with: {command}")
        return 0

    exit_with("convert", work)

"""How long a training step takes: this library, a per-step loop, a dense network, other libraries.

    pip install -r requirements-bench.txt
    python benchmarks/training_step.py

Prints a table for each network, all rows of which were measured in the same run, in turns, and
saves them as CSV and as a chart. The floor is a dense ReLU network of the same matrix products, on
T * B rows: the SNN's trained input filters need the gradient of its first product's input, so the
floor computes it as well. In each precision the floor has two more rows: one without the input's
gradient, and one without the allocator's setting that this library makes and all other rows have.
All take an AdamW step. The recurrent layers are at home in long sequences, and measured there.

Columns: ratio to the floor of the same precision, to the float32 floor, and how many times faster
than the float32 loop; the same for inference; memory at its peak beyond what the process held
before the network was built (Linux: resident set; GPU: allocated by PyTorch).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from measuring import interleave, machine, options, quartiles
from networks import (
    CONVOLUTIONS,
    DIGITS,
    FLOOR,
    LATENCY,
    LOOP,
    MAPS,
    MEMORY,
    PIXELS,
    POISSON,
    SNN,
    Network,
    Pretrained,
    Recurrent,
    Variant,
)
from other_libraries import installed
from torch import nn

from snn_lib.files import write_csv

ROUNDS, SECONDS = 8, 0.3  # visits to each variant, and how long one lasts at least
PRECISIONS = ("float32", "bfloat16")
LONG_ROUNDS = 3  # where a step takes seconds
BEHIND = "SNN-IIR, filters after the weights"
# Spikes per neuron and step in the hidden layers of the associative memory and of sequential_mnist.
TRAINED_RATE = 0.09


def variants(device: str) -> list[Variant]:
    """The rows of the table for one network."""
    ours = Variant(f"SNN-IIR {device}", SNN, "the model", backend=device)
    both = [
        FLOOR,
        replace(
            FLOOR,
            name=f"{FLOOR.name}, allocator as it is",
            note="memory mapped anew",
            keeps_memory=False,
        ),
        replace(
            FLOOR,
            name=f"{FLOOR.name}, no input gradient",
            note="one product less",
            input_gradient=False,
        ),
        ours,
        LOOP,
    ]
    half = [replace(variant, precision="bfloat16") for variant in both]
    return [*both, replace(ours, name="SNN-IIR eager", backend="eager"), *half, *installed()]


def rows_of(network: Network, device: str) -> list[Variant]:
    """The rows of one network: all variants, and the other order of the filters as well.

    In long sequences there are float32 alone and recurrent layers. A pretrained network stands
    beside a dense one that computes no gradient of its input, since it needs none itself.
    """
    if network.pretrained:
        floor = replace(FLOOR, input_gradient=False)
        ours = Variant(BEHIND, Pretrained, "as it was trained", backend=device)
        return [replace(row, precision=p) for p in PRECISIONS for row in (floor, ours, LOOP)]
    rows = [row for row in variants(device) if network.steps <= (row.longest or network.steps)]
    build = partial(SNN, behind=True, rate=None if network.images else TRAINED_RATE)
    note = "weighs an image once; spikes at the rate of a trained network"
    behind = Variant(BEHIND, build, note, backend=device)
    rows += [replace(behind, precision=precision) for precision in PRECISIONS]
    if network.steps < PIXELS.steps:
        return rows
    gated = [
        Variant(f"nn.{kind.__name__}", partial(Recurrent, kind), "gates instead of spikes")
        for kind in (nn.GRU, nn.LSTM)
    ]
    return [row for row in rows if row.precision == "float32" and row.backend != "eager"] + gated


def table(network: Network, rows: list[Variant], results: list[dict], where: str) -> list[dict]:
    """Medians, quartiles and ratios of one network."""
    found = {(row.name, row.precision): result for row, result in zip(rows, results, strict=True)}

    def median(name: str, precision: str, kind: str) -> float:
        return quartiles(found[name, precision][kind])[1]

    lines = []
    for row in rows:
        result = found[row.name, row.precision]
        line = {"network": str(network), "variant": row.name, "precision": row.precision}
        for kind in ("training", "inference"):
            first, middle, third = quartiles(result[kind])
            line |= {
                f"{kind}_ms": round(middle, 3),
                f"{kind}_q25": round(first, 3),
                f"{kind}_q75": round(third, 3),
                f"{kind}/floor": round(middle / median(FLOOR.name, row.precision, kind), 3),
                f"{kind}/floor_float32": round(middle / median(FLOOR.name, "float32", kind), 3),
                f"loop/{kind}": round(median(LOOP.name, "float32", kind) / middle, 3),
            }
        loop_memory = found[LOOP.name, "float32"]["memory"]
        line |= {
            "memory_MB": round(result["memory"] / 1e6, 1),
            "memory/loop": round(result["memory"] / max(loop_memory, 1), 3),
            "note": row.note,
            "machine": where,
        }
        lines.append(line)
    return lines


def show(lines: list[dict]) -> None:
    """Prints the table of one network."""
    print(f"\n{lines[0]['network']}   ({lines[0]['machine']})")
    print(
        f"{'':45}{'training step, ms':>26}{'/floor':>8}{'/fp32':>7}{'loop/':>7}"
        f"{'inference':>11}{'/floor':>8}{'memory':>11}{'/loop':>7}"
    )
    for line in lines:
        spread = f"({line['training_q25']:.1f} to {line['training_q75']:.1f})"
        print(
            f"{line['variant']:36} {line['precision']:8}{line['training_ms']:9.1f}{spread:>17}"
            f"{line['training/floor']:8.2f}{line['training/floor_float32']:7.2f}"
            f"{line['loop/training']:7.2f}{line['inference_ms']:11.1f}"
            f"{line['inference/floor']:8.2f}{line['memory_MB']:8.0f} MB{line['memory/loop']:7.2f}"
        )


def chart(path: Path, tables: list[list[dict]]) -> None:
    """Draws what a step takes beside one of the dense network: a few rows a network, sorted."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, grid = plt.subplots(
        3, -(-len(tables) // 3), figsize=(12, 8.5), sharex=True, layout="constrained"
    )
    for axes, lines in zip(grid.flat, tables, strict=False):
        shown = [line for line in lines if is_drawn(line)]
        shown.sort(key=lambda line: line["training/floor_float32"], reverse=True)
        for place, line in enumerate(shown):
            ours = line["variant"].startswith("SNN-IIR")
            axes.plot(
                line["training/floor_float32"],
                place,
                marker="o",
                color="tab:orange" if ours else "tab:gray",
                fillstyle="full" if line["precision"] == "float32" else "none",
            )
        names = [
            f"{line['variant']}{', bf16' * (line['precision'] != 'float32')}" for line in shown
        ]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title(lines[0]["network"], fontsize=10, loc="right")  # there is room on the left
        axes.grid(axis="x", alpha=0.3)
        axes.set_xscale("log")
        axes.tick_params(labelbottom=True)
    for empty in grid.flat[len(tables) :]:
        empty.remove()
    ticks = (0.2, 0.5, 1, 2, 5, 10)
    axes.set_xlim(0.2, 12)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("time of a training step, in those of the dense network in float32 (the line)")
    figure.suptitle(tables[0][0]["machine"], fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def is_drawn(line: dict) -> bool:
    """Whether the chart has a row: all libraries in float32, and ours in bfloat16 too."""
    left_out = ("floor", "eager", "unbound", "SynapseFilter")
    ours = line["variant"].startswith("SNN-IIR")
    return (ours or line["precision"] == "float32") and not any(
        word in line["variant"] for word in left_out
    )


def main() -> None:
    chosen = options(__doc__, "training_step")
    tables = []
    notes = {}
    for network in (DIGITS, POISSON, LATENCY, MEMORY, MAPS, CONVOLUTIONS, PIXELS):
        rows = rows_of(network, chosen.device)
        notes |= {row.name: row.note for row in rows}
        rounds = ROUNDS if network.steps < PIXELS.steps else LONG_ROUNDS
        network = network.small() if chosen.smoke else network
        rounds, seconds = (1, 0.0) if chosen.smoke else (rounds, SECONDS)
        results = interleave([(row, network) for row in rows], chosen, rounds, seconds)
        tables.append(table(network, rows, results, machine(chosen)))
        show(tables[-1])
    write_csv(chosen.output.with_suffix(".csv"), [line for lines in tables for line in lines])
    chart(chosen.output, tables)
    print("\nWhat is computed:")
    for variant, note in notes.items():
        print(f"{variant:33} {note}")
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

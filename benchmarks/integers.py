"""What is left of the accuracy in integers, and do both C sources compute what they should?

    python benchmarks/integers.py

Every pretrained classifier becomes an integer network of 8 and of 4 bits, with fixed points from
200 validation samples. Its C source, compiled here, classifies all test samples. On the first 1,000
it is compared with the integer network in Python, bit for bit, and the C source in floats with the
compiled network: how many sequences have the same output everywhere (for spikes), or how far it
differs (else). Saves a row for each model (CSV); a model that has its row is left out.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host_c import Compiled
from inference_agreement import answers_of, batches, runs
from measuring import earlier_rows, options
from pretrained import NAMES, ROOT, load
from torch import Tensor

import snn_lib
from snn_lib.files import write_csv
from snn_lib.inference import IntegerNetwork, compiled, quantise, to_c
from snn_lib.inference.staging import raw_steps
from snn_lib.tasks.classification import Classification

CALIBRATION, COMPARED = 200, 1000
FAST = "-O3", "-march=native", "-ffp-contract=off"


def calibration(experiment: Any) -> Tensor:
    """The input of some validation samples, ``(T, B, *features)``; shorter ones end in zeros."""
    found: list[Tensor] = []
    for batch in experiment.task.batches("validation"):
        found.append(batch.x.float())
        if sum(x.shape[1] for x in found) >= CALIBRATION:
            break
    whole = torch.zeros(max(map(len, found)), sum(x.shape[1] for x in found), *found[0].shape[2:])
    start = 0
    for x in found:
        whole[: len(x), start : start + x.shape[1]] = x
        start += x.shape[1]
    return whole[:, :CALIBRATION]


def in_c(network: Any, folder: str) -> Compiled:
    """A network as a program of this machine."""
    to_c(network, Path(folder) / "network.c")
    if isinstance(network, IntegerNetwork):
        kind = network.staged.input_kind.removesuffix("_t")
        return Compiled(Path(folder), np.int32, kind, FAST)
    return Compiled(Path(folder), np.float32, options=FAST)


def raw_batches(network: Any, experiment: Any, count: int) -> Iterator[tuple[Any, Tensor, Any]]:
    """Batches of test samples, their input, and their values as they were measured."""
    for batch, x in batches(experiment, count):
        yield batch, x, raw_steps(network.preparation, x)


def correct(best: np.ndarray, batch: Any) -> int:
    """How many classes are right, given the class after each step, ``(T, B)``."""
    ends = [len(best)] * best.shape[1] if batch.lengths is None else batch.lengths
    return int((best[np.asarray(ends) - 1, np.arange(best.shape[1])] == batch.y.numpy()).sum())


@torch.inference_mode()
def measure(name: str, chosen: Any) -> dict[str, Any] | None:
    """The row of one model."""
    network = snn_lib.load(next(ROOT.glob(f"*checkpoint/pretrained_{name}")))
    experiment = load(name, chosen)
    task, model = experiment.task, experiment.model.eval()
    if not isinstance(task, Classification):
        return None
    row: dict[str, Any] = {"model": name, "samples": 0, "accuracy": 0}
    integers = {bits: quantise(network, calibration(experiment), bits) for bits in (8, 4)}
    with tempfile.TemporaryDirectory() as folder:
        for network_, end in ((network, ""), *((integers[b], f"_{b}_bit") for b in (8, 4))):
            where = Path(folder) / f"network{end}"
            where.mkdir()
            program, stream = in_c(network_, str(where)), compiled(network)
            right = count = same = saturated = 0
            away = 0.0
            for batch, x, raw in raw_batches(network, experiment, 10**9):
                given = raw if network_ is network else network_.integers(raw)
                output, best, _ = program.run(given)
                right += correct(best, batch)
                if network_ is network:
                    row["accuracy"] += int((answers_of(task, batch, model(x)[0]) == batch.y).sum())
                if count < COMPARED:
                    if network_ is network:
                        expected = np.stack([runs(stream, one) for one in x.unbind(1)], 1)
                    else:
                        network_.reset()
                        expected = network_.run(given)
                        saturated += network_.saturated
                    alike = (output == expected.reshape(output.shape)).all((0, 2))
                    same += int(alike.sum())
                    away = max(away, float(abs(output - expected.reshape(output.shape)).max()))
                count += x.shape[1]
            row |= {f"accuracy_c{end}": right / count, f"same_c{end}": same}
            row |= {f"away_c{end}": away, f"saturated{end}": saturated}
        row |= {"samples": count, "accuracy": row["accuracy"] / count}
    return row


def main() -> None:
    chosen = options(__doc__, "integers")
    path = chosen.output.with_suffix(".csv")
    rows = earlier_rows(path)
    for name in ["snn_mlp_1_latency_behind"] if chosen.smoke else NAMES:
        if any(row["model"] == name for row in rows):
            continue
        row = measure(name, chosen)
        if row is not None:
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_csv(path, rows)
    print(f"\nsaved {path}")


if __name__ == "__main__":
    main()

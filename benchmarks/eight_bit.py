"""What accuracy is left with weights of 8 bits? Of every pretrained classifier as an ONNX graph.

    python benchmarks/eight_bit.py

ONNX Runtime quantises the graph: weights become 8-bit integers with a scale for each output, and
what arrives at them is rounded to 8 bits as it comes (``quantize_dynamic``). Filters and neurons
stay in float32. Prints and saves (CSV) the accuracy on the first 1,000 test samples before and
after, how many answers changed, and the sizes of the files.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from inference_agreement import answers_of, batches, runs_onnx
from measuring import options
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from pretrained import NAMES, OnnxStream, load, onnx_session

from snn_lib.files import write_csv
from snn_lib.tasks.classification import Classification

SAMPLES = 1000


@torch.inference_mode()
def measure(name: str, experiment: Any, samples: int) -> dict[str, Any]:
    """The row of one model."""
    task, model = experiment.task, experiment.model.eval()
    count, correct, changed, streams = 0, [0, 0], 0, []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / file for file in ("network.onnx", "clean.onnx", "eight_bit.onnx")]
        for batch, x in batches(experiment, samples):
            if not streams:
                streams = [OnnxStream(model, x.shape[2:], folder) for _ in range(2)]
                quant_pre_process(files[0], files[1])
                quantize_dynamic(files[1], files[2], per_channel=True, weight_type=QuantType.QInt8)
                streams[1].session = onnx_session(files[2])
            answers = [answers_of(task, batch, runs_onnx(stream, x)) for stream in streams]
            count += len(batch.y)
            changed += int((answers[0] != answers[1]).sum())
            correct = [
                total + int((mine == batch.y).sum())
                for total, mine in zip(correct, answers, strict=True)
            ]
        sizes = [file.stat().st_size / 1e6 for file in (files[0], files[2])]
    return {
        "model": name,
        "samples": count,
        "accuracy": round(correct[0] / count, 4),
        "accuracy_8_bit": round(correct[1] / count, 4),
        "changed_answers": changed,
        "megabytes": round(sizes[0], 2),
        "megabytes_8_bit": round(sizes[1], 2),
    }


def main() -> None:
    chosen = options(__doc__, "eight_bit")
    logging.getLogger().setLevel(logging.ERROR)  # what to do before quantising, which is done
    samples, names, rows = SAMPLES, NAMES, []
    if chosen.smoke:
        samples, names = 10, ["snn_mlp_1", "event_vision"]
    for name in names:
        experiment = load(name, chosen, samples)
        if isinstance(experiment.task, Classification):
            rows.append(measure(name, experiment, samples))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

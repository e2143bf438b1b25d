"""Runs an exported network on a stream, with nothing but ONNX Runtime: no PyTorch, no snn_lib.

    pip install onnxruntime
    python examples/stream_onnx.py network.onnx < steps.txt

Each line of the input is one time step, a JSON list of its features. For each line it prints the
class that the network would answer if the stream ended there. The file says how the answer comes
from the outputs. If it does not, say it after the file's name: count, mean, last or maximum. The
outputs of a network that predicts numbers are no classes: read them yourself.
"""

import json
import sys

import numpy as np
import onnxruntime

# The answer so far, and one more output. A mean has the same class as a sum.
READOUTS = {
    "count": np.add,
    "mean": np.add,
    "maximum": np.maximum,
    "last": lambda answer, output: output,
}

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a step is too short to be shared out
# Traces decay for ever; as denormal numbers they would make a step ten times slower.
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = onnxruntime.InferenceSession(sys.argv[1], options)
metadata = session.get_modelmeta().custom_metadata_map
classes = json.loads(metadata["classes"])
name = sys.argv[2] if len(sys.argv) > 2 else metadata["readout"]
if name not in READOUTS:
    said = f"the readout is {name!r}, and this script knows count, mean, last and maximum"
    remedy = ": if the network answers with classes, say one of them after the file's name"
    sys.exit(said if name else said + remedy)

x, *states = session.get_inputs()
dtype = {"tensor(float)": np.float32, "tensor(double)": np.float64}[x.type]
state = {s.name: np.zeros((1, *s.shape[1:]), dtype) for s in states}
answer = None
for number, line in enumerate(sys.stdin, 1):
    try:
        step = np.array(json.loads(line), dtype).reshape(1, *x.shape[1:])
    except (ValueError, TypeError):
        size = " x ".join(map(str, x.shape[1:]))
        sys.exit(f"line {number} is {line.strip()[:60]!r}, expected a JSON list of {size} numbers")
    output, *following = session.run(None, {x.name: step, **state})
    state = dict(zip(state, following, strict=True))  # the graph returns them in their order
    output = output[0].astype(np.float64)  # float32 counts no further than 2^24
    answer = output if answer is None else READOUTS[name](answer, output)
    best = int(answer.argmax())
    print(classes[best] if classes else best)

"""Runs an exported network on a stream, with nothing but ONNX Runtime: no PyTorch, no snn_lib.

    pip install onnxruntime
    python examples/stream_onnx.py network.onnx < steps.txt

Each line of the input is one time step, a JSON list of its features. For each line it prints the
class that is ahead so far, by the sum of the outputs.
"""

import json
import sys

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a step is too short to be shared out
# Traces decay for ever; as denormal numbers they would make a step ten times slower.
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = onnxruntime.InferenceSession(sys.argv[1], options)
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])

x, *states = session.get_inputs()
state = {s.name: np.zeros((1, *s.shape[1:]), np.float32) for s in states}
total = 0.0
for line in sys.stdin:
    step = np.array(json.loads(line), np.float32).reshape(1, *x.shape[1:])
    output, *following = session.run(None, {x.name: step, **state})
    state = dict(zip(state, following, strict=True))  # the graph returns them in their order
    total = total + output[0]
    best = int(total.argmax())
    print(classes[best] if classes else best)

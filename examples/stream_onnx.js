// Runs an exported network on a stream in Node.js, as stream_onnx.py does in Python.
//
//     npm install onnxruntime-node
//     node examples/stream_onnx.js network.onnx mean < steps.txt
//
// Each line of the input is one time step, a JSON list of its features. For each line it prints the
// number of the class that the network would answer if the stream ended there. ONNX Runtime for
// Node.js does not show a file's metadata, so say how the answer comes from the outputs, as the
// network was trained: count, mean, last or maximum. The outputs of a network that predicts numbers
// are no classes: read them yourself.

const ort = require("onnxruntime-node");
const readline = require("readline");

const add = (answer, output) => answer + output;
// The answer so far, and one more output. A mean has the same class as a sum.
const READOUTS = { count: add, mean: add, maximum: Math.max, last: (answer, output) => output };

const ARRAYS = { float32: Float32Array, float64: Float64Array };
const tensor = (type, shape, values) => new ort.Tensor(type, ARRAYS[type].from(values), shape);
const zeros = ({ type, shape: [, ...features] }) =>
  tensor(type, [1, ...features], Array(features.reduce((a, b) => a * b, 1)).fill(0));

async function main(path, name) {
  if (!(name in READOUTS)) throw new Error("say count, mean, last or maximum after the file's name");
  const session = await ort.InferenceSession.create(path, { intraOpNumThreads: 1 });
  // One sample; at the first step every state is zero.
  const feeds = Object.fromEntries(session.inputMetadata.map((one) => [one.name, zeros(one)]));
  const answer = [];
  for await (const line of readline.createInterface({ input: process.stdin })) {
    feeds.x = tensor(feeds.x.type, feeds.x.dims, JSON.parse(line).flat(Infinity));
    const results = await session.run(feeds);
    for (const state of session.inputNames.slice(1)) feeds[state] = results[state + ".next"];
    results.y.data.forEach((value, n) => {
      answer[n] = n in answer ? READOUTS[name](answer[n], value) : value;
    });
    console.log(answer.indexOf(Math.max(...answer)));
  }
}

main(process.argv[2], process.argv[3]).catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});

// Runs an exported network on a stream in Node.js, as stream_onnx.py does in Python.
//
//     npm install onnxruntime-node
//     node examples/stream_onnx.js network.onnx < steps.txt
//
// Each line of the input is one time step, a JSON list of its features. For each line it prints the
// number of the class that is ahead so far, by the sum of the outputs.

const ort = require("onnxruntime-node");
const readline = require("readline");

const tensor = (shape, values) =>
  new ort.Tensor("float32", values ?? new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);

async function main() {
  const session = await ort.InferenceSession.create(process.argv[2], { intraOpNumThreads: 1 });
  // One sample; at the first step every state is zero.
  const shapes = session.inputMetadata.map(({ name, shape }) => [name, [1, ...shape.slice(1)]]);
  const feeds = Object.fromEntries(shapes.map(([name, shape]) => [name, tensor(shape)]));
  const total = [];
  for await (const line of readline.createInterface({ input: process.stdin })) {
    feeds.x = tensor(feeds.x.dims, Float32Array.from(JSON.parse(line).flat(Infinity)));
    const results = await session.run(feeds);
    for (const [name] of shapes.slice(1)) feeds[name] = results[name + ".next"];
    results.y.data.forEach((value, n) => (total[n] = (total[n] ?? 0) + value));
    console.log(total.indexOf(Math.max(...total)));
  }
}

main();

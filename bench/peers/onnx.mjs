// Times the graphs of onnx_graphs.py in ONNX Runtime, one thread. The time of the identity graph is
// what a call from Node costs; it is subtracted. Prints a JSON line a graph.
// usage: node onnx.mjs MODULE_FOLDER FOLDER N...
import {createRequire} from 'node:module';

const [modules, folder, ...sizes] = process.argv.slice(2);
const ort = createRequire(modules + '/').call(null, 'onnxruntime-node');

const tensor = (d) => new ort.Tensor('float32', Float32Array.from({length: d}, () => Math.random() - 0.5), [1, 1, d]);

const open = async (name, d) => {
  const session = await ort.InferenceSession.create(`${folder}/${name}.onnx`, {intraOpNumThreads: 1, interOpNumThreads: 1});
  const feeds = Object.fromEntries(session.inputNames.map((input) => [input, tensor(d)]));
  return () => session.run(feeds);
};

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

const time = async (run, calls) => {
  const times = [];
  for (let i = 0; i < calls; ++i) {
    const begin = process.hrtime.bigint();
    await run();
    times.push(Number(process.hrtime.bigint() - begin) / 1000);
  }
  return median(times);
};

const identity = await open('identity', 128);
const report = async (name, data, items, d, calls) => {
  const run = await open(name, d);
  const nets = [], calls_only = [];
  for (let round = 0; round < 6; ++round) {
    const empty = await time(identity, calls), full = await time(run, calls);
    if (round === 0) continue;  // warms caches and pages
    calls_only.push(empty);
    nets.push(full - empty);
  }
  console.log(JSON.stringify({name: 'onnx_' + name, data, items, value: +median(nets).toPrecision(4), unit: 'us', call_overhead: +median(calls_only).toPrecision(4)}));
};

await report('gru_128', 'GRU step, hidden 128, f32, ONNX Runtime less an identity call', 0, 128, 2000);
for (const n of sizes)
  await report(`slate_${n}`, `GRU step + MatMul + TopK, N=${n} d=64, ONNX Runtime less an identity call`, +n, 64, n > 100000 ? 10 : 200);

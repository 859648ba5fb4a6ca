"""Writes the ONNX graphs that bench/peers/onnx.mjs times: the identity, whose time is the cost of a
call; a GRU step of hidden 128; a GRU step, the product with all vectors and TopK.
usage: onnx_graphs.py FOLDER N..."""
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save


def write(path, nodes, inputs, outputs, weights):
    def values(shapes):
        return [helper.make_tensor_value_info(n, t, s) for n, t, s in shapes]

    graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs),
                              [numpy_helper.from_array(v, n) for n, v in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 7
    save(model, path)


def gru(d, random):
    def some(*shape):
        return (random.standard_normal(shape) / np.sqrt(d)).astype(np.float32)

    node = helper.make_node("GRU", ["x", "w", "r", "b", "", "h"], ["", "h_out"], hidden_size=d,
                            linear_before_reset=1)
    return node, {"w": some(1, 3 * d, d), "r": some(1, 3 * d, d), "b": some(1, 6 * d)}


def main(folder, sizes):
    random = np.random.default_rng(1)
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    write(f"{folder}/identity.onnx", [helper.make_node("Identity", ["h"], ["h_out"])],
          [("h", f32, [1, 1, 128])], [("h_out", f32, [1, 1, 128])], {})
    step, weights = gru(128, random)
    state = ("h", f32, [1, 1, 128])
    write(f"{folder}/gru_128.onnx", [step], [("x", f32, [1, 1, 128]), state],
          [("h_out", f32, [1, 1, 128])], weights)
    for n in sizes:
        vectors = np.fromfile(f"{folder}/vectors_{n}.f32", np.float32).reshape(n, 64)
        step, weights = gru(64, random)
        nodes = [step, helper.make_node("Reshape", ["h_out", "shape"], ["query"]),
                 helper.make_node("MatMul", ["query", "vectors"], ["scores"]),
                 helper.make_node("TopK", ["scores", "k"], ["best", "items"])]
        weights |= {"vectors": np.ascontiguousarray(vectors.T), "k": np.array([100]),
                    "shape": np.array([1, 64])}
        write(f"{folder}/slate_{n}.onnx", nodes,
              [("x", f32, [1, 1, 64]), ("h", f32, [1, 1, 64])],
              [("best", f32, [1, 100]), ("items", i64, [1, 100])], weights)


main(sys.argv[1], [int(n) for n in sys.argv[2:]])

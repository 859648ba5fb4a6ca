"""Times PyTorch's GRU step, product with all vectors and topk, one thread. Prints JSON lines.
usage: torch_peer.py FOLDER N..."""
import json
import sys
import time

import numpy as np
import torch


def median_us(work, calls):
    times = []
    for call in range(calls + calls // 5):
        begin = time.perf_counter()
        work()
        if call >= calls // 5:
            times.append((time.perf_counter() - begin) * 1e6)
    return float(np.median(times))


def report(name, data, items, value):
    print(json.dumps({"name": name, "data": data, "items": items, "value": round(value, 2),
                      "unit": "us"}), flush=True)


torch.set_num_threads(1)
folder, sizes = sys.argv[1], [int(n) for n in sys.argv[2:]]
with torch.inference_mode():
    cell, x, h = torch.nn.GRUCell(128, 128), torch.randn(1, 128), torch.randn(1, 128)
    report("torch_gru_128", "GRU step, hidden 128, f32, PyTorch", 0, median_us(lambda: cell(x, h), 2000))
    for n in sizes:
        vectors = torch.from_numpy(np.fromfile(f"{folder}/vectors_{n}.f32", np.float32).reshape(n, 64))
        query = torch.randn(64)
        report(f"torch_slate_{n}", f"product + topk, N={n} d=64, PyTorch", n,
               median_us(lambda: torch.topk(vectors @ query, 100), 10 if n > 100_000 else 200))

#!/usr/bin/env python3
"""Time and memory of `personalize convert` for item vectors of 1,000,000 x 128 f32 (512 MB), against
a copy of the input and zstd -3 of what the output holds, both synced as the output is. One JSON
line an element type.

usage: convert.py PERSONALIZE FOLDER    (3 GB; pinned to the last core by bench/run)
"""
import json
import multiprocessing
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import time

import numpy as np

ITEMS, DIMENSION, USERS, ROUNDS = 1_000_000, 128, 1000, 5


def make(folder):
    """A matrix factorisation, its ids, and its item vectors as the int8 rows of a model file."""
    random = np.random.default_rng(1)
    tensors = {"user.weight": random.standard_normal((USERS, DIMENSION), np.float32),
               "item.weight": random.standard_normal((ITEMS, DIMENSION), np.float32)}
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape,
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            tensor.tofile(file)
    rows = tensors["item.weight"]
    scales = np.abs(rows).max(axis=1) / 127
    with open(folder / "int8", "wb") as file:
        scales.tofile(file)
        np.rint(rows / scales[:, None]).astype(np.int8).tofile(file)
    for name, count in [("ITEM_ID", ITEMS), ("USER_ID", USERS)]:
        with open(folder / f"{name}.csv", "w") as file:
            file.write("\n".join([name, *(f"{name}{i}" for i in range(count))]) + "\n")


def run(*command):
    """Seconds and peak bytes."""
    begin = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.monotonic() - begin, usage.ru_maxrss * 1024


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    personalize, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    # In a process of its own: a child's peak memory counts what its parent holds.
    maker = multiprocessing.Process(target=make, args=(folder,))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    source = folder / "model.safetensors"
    for kind, held in [("f32", source), ("int8", folder / "int8")]:
        ours, theirs, memory = [], [], 0
        for _ in range(ROUNDS):
            seconds, peak = run(personalize, "convert", "--from", source,
                                "--items", folder / "ITEM_ID.csv", "--users",
                                folder / "USER_ID.csv", "--element-type", kind,
                                "-o", folder / "model.pzm")
            ours.append(seconds)
            memory = max(memory, peak)
            steps = [run("cp", source, folder / "copy"), run("sync", folder / "copy"),
                     run("zstd", "-3", "-q", "-f", "--single-thread", held, "-o", folder / "packed"),
                     run("sync", folder / "packed")]
            theirs.append(sum(seconds for seconds, _ in steps))
        print(json.dumps({
            "name": "convert", "data": f"1,000,000 x 128 f32 (512 MB) to {kind}; peak memory "
            f"{memory / source.stat().st_size:.2f} of the input",
            "value": statistics.median(ours), "unit": "s",
            "peer": "copy of the input and zstd -3 of the output, synced",
            "peer_value": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs))}), flush=True)


main()

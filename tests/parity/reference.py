#!/usr/bin/env python3
"""Runs random encoders over random histories in PyTorch and writes inputs and results.

usage: reference.py FOLDER

FOLDER/cases.json: a list of cases, each with name, dimension d, items N, event_types E, time_gaps
B, histories H, ranked R, operations [[kind, argument], ...] as in EncoderOp, weights [[rows,
columns], ...].
FOLDER/NAME.f32, little-endian, in this order: item vectors [N, d], biases [N], event-type embedding
[E, d], time-gap embedding [B, d], the weights; then what PyTorch gets: hidden [H, d], scores
[H, N].
FOLDER/NAME.i64: lengths [H]; per event of all histories its item, event type (-1: none) and Unix
timestamp; then the R best items of each history [H, R].
"""
import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn

HISTORIES = 1000
LONGEST = 60
RANKED = 64
KIND = {name: number for number, name in enumerate(
    ["embed_sum", "linear", "gru", "layer_norm", "activation", "save", "add"], 1)}
ACTIVATION = {1: torch.sigmoid, 2: torch.tanh, 3: torch.relu, 4: nn.functional.gelu}
SIGMOID, TANH, RELU, GELU = ACTIVATION


def gru(hidden):
    return [("gru", hidden)]


def trained(dimension, layers, feed_forward):
    """What `personalize train` exports."""
    program = [("layer_norm", 0)]
    for _ in range(layers):
        program += [("save", 0), ("gru", dimension), ("add", 0), ("layer_norm", 0)]
        if feed_forward:
            program += [("save", 0), ("linear", feed_forward * dimension), ("activation", GELU),
                        ("linear", dimension), ("add", 0), ("layer_norm", 0)]
    return program


# name, dimension, items, event types, time-gap buckets, program after embed_sum
CASES = [
    ("gru-32", 32, 1000, 3, 32, gru(32)),
    ("gru-149", 149, 700, 5, 16, gru(149)),
    ("gru-50-two-layers", 50, 1000, 0, 32, gru(77) + gru(50)),
    ("trained-128", 128, 1000, 4, 32, trained(128, 1, 4)),
    ("trained-50-two-layers", 50, 333, 2, 0, trained(50, 2, 2)),
    ("every-operation-37", 37, 500, 0, 0,
     [("save", 7), ("linear", 45), ("activation", TANH), ("gru", 33), ("activation", RELU),
      ("linear", 37), ("add", 7), ("activation", SIGMOID), ("layer_norm", 0), ("gru", 37)]),
]


class Encoder(nn.Module):
    def __init__(self, dimension, items, event_types, time_gaps, program):
        super().__init__()
        self.program = program
        self.items = nn.Embedding(items, dimension)
        self.event_types = nn.Embedding(event_types, dimension) if event_types else None
        self.time_gaps = nn.Embedding(time_gaps, dimension) if time_gaps else None
        self.biases = nn.Parameter(torch.randn(items))
        self.layers = nn.ModuleList()
        width = dimension
        for kind, argument in program:
            if kind == "linear":
                self.layers.append(nn.Linear(width, argument))
                width = argument
            elif kind == "gru":
                self.layers.append(nn.GRU(width, argument, batch_first=True))
                width = argument
            elif kind == "layer_norm":
                layer = nn.LayerNorm(width)
                nn.init.normal_(layer.weight, 1, 0.3)
                nn.init.normal_(layer.bias, 0, 0.3)
                self.layers.append(layer)

    def forward(self, item, event_type, time_gap):
        x = self.items(item)
        if self.event_types is not None:
            known = (event_type >= 0).unsqueeze(-1)
            x = x + self.event_types(event_type.clamp(min=0)) * known
        if self.time_gaps is not None:
            x = x + self.time_gaps(time_gap)
        saved = {}
        layers = iter(self.layers)
        for kind, argument in self.program:
            if kind == "gru":
                x, _ = next(layers)(x)
            elif kind in ("linear", "layer_norm"):
                x = next(layers)(x)
            elif kind == "activation":
                x = ACTIVATION[argument](x)
            elif kind == "save":
                saved[argument] = x
            else:
                x = x + saved[argument]
        return x

    def matrices(self):
        for layer in self.layers:
            for parameter in layer.parameters():  # PyTorch's order is EncoderOp's
                yield parameter.detach().reshape(-1, parameter.shape[-1])


def time_gap_buckets(timestamps, buckets):
    gaps = [max(b - a, 0) for a, b in zip(timestamps, timestamps[1:])]
    return [0] + [1 + min((gap + 1).bit_length() - 1, buckets - 2) for gap in gaps]


def write_case(folder, rng, name, dimension, items, event_types, time_gaps, program):
    encoder = Encoder(dimension, items, event_types, time_gaps, program).eval()
    lengths = rng.integers(1, LONGEST + 1, HISTORIES)
    lengths[:2] = 1, LONGEST
    shape = HISTORIES, LONGEST
    item = rng.integers(items, size=shape)
    event_type = rng.integers(-1, event_types, size=shape)
    # Gaps of all magnitudes, none at all, and events out of order.
    steps = np.where(rng.random(shape) < 0.7, 2 ** rng.uniform(0, 34, shape), -100)
    steps = np.where(rng.random(shape) < 0.1, 0, steps).astype(np.int64)
    timestamp = 1_600_000_000 + np.cumsum(steps, axis=1)
    gap = np.zeros(shape, np.int64)
    if time_gaps:
        for h in range(HISTORIES):
            gap[h] = time_gap_buckets(timestamp[h].tolist(), time_gaps)
    # Steps after a history's end are computed and not looked at.
    within = np.arange(LONGEST) < lengths[:, None]
    events = np.stack([item, event_type, timestamp], axis=2)[within]
    with torch.no_grad():
        hidden = encoder(*(torch.from_numpy(a) for a in (item, event_type, gap)))
        hidden = hidden[torch.arange(HISTORIES), torch.from_numpy(lengths) - 1]
        scores = hidden @ encoder.items.weight.T + encoder.biases
        ranked = torch.sort(scores, descending=True, stable=True).indices[:, :RANKED]
    weights = list(encoder.matrices())
    embeddings = [e.weight for e in (encoder.event_types, encoder.time_gaps) if e is not None]
    floats = [encoder.items.weight, encoder.biases, *embeddings, *weights, hidden, scores]
    with open(folder / f"{name}.f32", "wb") as out:
        for tensor in floats:
            out.write(tensor.detach().numpy().astype("<f4").tobytes())
    with open(folder / f"{name}.i64", "wb") as out:
        for values in (lengths, events, ranked.numpy()):
            out.write(values.astype("<i8").tobytes())
    operations = [(KIND["embed_sum"], 0)]
    for kind, argument in program:
        operations.append((KIND[kind], argument if kind in ("activation", "save", "add") else 0))
    return {"name": name, "dimension": dimension, "items": items, "event_types": event_types,
            "time_gaps": time_gaps, "histories": HISTORIES, "ranked": RANKED,
            "operations": operations, "weights": [list(w.shape) for w in weights]}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    cases = [write_case(folder, rng, *case) for case in CASES]
    (folder / "cases.json").write_text(json.dumps(cases))


main()

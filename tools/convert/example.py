#!/usr/bin/env python3
"""Trains a small GRU in PyTorch, saves it in each format that `personalize convert` reads, and
converts it.

usage: example.py PERSONALIZE INTERACTIONS.csv FOLDER [--dimension D] [--epochs E] [--window W]

PERSONALIZE is the command; FOLDER takes items.csv, the model as .safetensors, .npz, .pt (and in
the format of PyTorch before 1.6) and .onnx, and a .pzm made of each. Each user's two newest events
are not trained on, so that `personalize evaluate` (leave-one-out) is fair.
"""
import argparse
import csv
import json
import pathlib
import struct
import subprocess
import warnings

import numpy as np
import torch
from torch import nn


class Recommender(nn.Module):
    """Scores every item as the next one. Row i of the embedding is row i of items.csv."""

    def __init__(self, items, dimension):
        super().__init__()
        self.embedding = nn.Embedding(items, dimension)
        self.gru = nn.GRU(dimension, dimension, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(items))

    def forward(self, history):  # [batch, events] -> [batch, events, items]
        hidden, _ = self.gru(self.embedding(history))
        return hidden @ self.embedding.weight.T + self.bias


class LastScores(nn.Module):
    """What an ONNX file holds: the scores behind the last event."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, history):
        hidden, _ = self.model.gru(self.model.embedding(history))
        return hidden[:, -1] @ self.model.embedding.weight.T + self.model.bias


def read_histories(path):
    """Item ids in order of first appearance, and each user's item indices in time order."""
    with open(path, newline="") as file:
        rows = [(int(r["TIMESTAMP"]), r["USER_ID"], r["ITEM_ID"]) for r in csv.DictReader(file)]
    rows.sort(key=lambda row: row[0])
    items, histories = {}, {}
    for _, user, item in rows:
        histories.setdefault(user, []).append(items.setdefault(item, len(items)))
    return list(items), list(histories.values())


def train(model, histories, epochs, window):
    windows = [h[at:at + window + 1] for h in histories for at in range(0, len(h) - 1, window)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for epoch in range(epochs):
        total = count = 0
        for batch in torch.randperm(len(windows)).split(64):
            events = nn.utils.rnn.pad_sequence(
                [torch.tensor(windows[w]) for w in batch], batch_first=True, padding_value=-1)
            following = events[:, 1:]
            hidden, _ = model.gru(nn.functional.dropout(
                model.embedding(events[:, :-1].clamp(min=0)), 0.2))
            hidden = nn.functional.dropout(hidden[following >= 0], 0.2)
            scores = hidden @ model.embedding.weight.T + model.bias
            loss = nn.functional.cross_entropy(scores, following[following >= 0])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(scores)
            count += len(scores)
        print(f"epoch {epoch + 1}: loss {total / count:.4f}", flush=True)


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.complex64: "C64"}


def save_safetensors(tensors, path):
    """The whole format, for where the safetensors package is not installed."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())


def save(model, folder):
    tensors = model.state_dict()
    save_safetensors(tensors, folder / "model.safetensors")
    np.savez(folder / "model.npz", **{name: t.numpy() for name, t in tensors.items()})
    torch.save(tensors, folder / "model.pt")
    torch.save(tensors, folder / "model_old.pt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(LastScores(model), torch.zeros(1, 2, dtype=torch.long),
                          folder / "model.onnx", input_names=["history"], output_names=["scores"],
                          dynamic_axes={"history": {1: "events"}}, opset_version=14)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("personalize")
    parser.add_argument("interactions")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--window", type=int, default=50)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(1)
    items, histories = read_histories(options.interactions)
    model = Recommender(len(items), options.dimension)
    nn.init.normal_(model.embedding.weight, std=options.dimension ** -0.5)
    train(model, [h[:-2] for h in histories if len(h) > 3], options.epochs, options.window)
    model.eval()
    save(model, options.folder)
    with open(options.folder / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([["ITEM_ID"], *([item] for item in items)])

    for source in ["model.safetensors", "model.npz", "model.pt", "model_old.pt", "model.onnx"]:
        subprocess.run(
            [options.personalize, "convert", "--from", options.folder / source,
             "--items", options.folder / "items.csv", "--interactions", options.interactions,
             "--element-type", "f32", "-o", options.folder / (source + ".pzm")],
            check=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""ONNX graphs that do something else to the history, the vectors or the scores than a chain of layers:
each converts to a model that ranks as PyTorch does, or is refused with a line that says why.

usage: graphs.py PERSONALIZE FOLDER
"""
import csv
import pathlib
import re
import subprocess
import sys
import warnings

import numpy as np
import torch
from torch import nn

ITEMS, WIDTH, LONGEST = 40, 8, 12
INDICES = "changes the history's item indices"
SCORES = "changes the scores in a way"


class Base(nn.Module):
    """embed, recur, pick, score: each kind of graph replaces one of them."""
    layers, padding, tied = 1, 0, True
    shape, names, dynamic = (1, 3), ["history"], {"history": {1: "events"}}

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ITEMS + self.padding, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=self.layers, batch_first=True)
        self.bias = nn.Parameter(torch.randn(ITEMS + self.padding))
        self.extra = nn.Parameter(torch.randn(ITEMS + self.padding))

    def embed(self, history):
        return self.embedding(history)

    def recur(self, x):
        return self.gru(x)[0]

    def pick(self, h):
        return h[:, -1]

    def score(self, h):
        return h @ self.embedding.weight.T + self.bias

    def forward(self, history):
        return self.score(self.pick(self.recur(self.embed(history))))


def kind(expected, base=Base, **parts):
    """expected: None where it converts, else what the refusal says."""
    made = type("Graph", (base,), {**parts, "expected": expected})
    return made


def two_outputs(self, history):
    scores = Base.forward(self, history)
    return scores, torch.softmax(scores, 1)


def two_heads(self, history):
    h = self.pick(self.recur(self.embed(history)))
    return self.score(h), h @ self.embedding.weight.T + self.extra


def scores_negated_and_vector(self, history):
    h = self.pick(self.recur(self.embed(history)))
    return -self.score(h), h


def residual(self, x):
    return x + self.gru(x)[0]


class Tower(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH)
        self.position = nn.Embedding(50, WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.prelu = nn.PReLU()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.both = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.register_buffer("known", torch.arange(ITEMS) % 7)
        self.register_buffer("remap", torch.randperm(ITEMS))


GRAPHS = {
    # Converted.
    "plain": kind(None),
    "two layers": kind(None, layers=2),
    "padding row": kind(None, padding=1),
    "popularity subtracted": kind(None, score=lambda s, h: Base.score(s, h) - s.extra),
    "two biases": kind(None, score=lambda s, h: Base.score(s, h) + s.extra.exp()),
    "temperature and a bias": kind(
        None, score=lambda s, h: (h @ s.embedding.weight.T + s.bias) / 0.07 - s.extra),
    "softmax": kind(None, score=lambda s, h: torch.softmax(Base.score(s, h), 1)),
    "log softmax": kind(None, score=lambda s, h: torch.log_softmax(Base.score(s, h), -1)),
    "sigmoid": kind(None, score=lambda s, h: torch.sigmoid(Base.score(s, h))),
    "squeeze makes an If": kind(None, pick=lambda s, h: h[:, -1:].squeeze(1)),
    "last by length": kind(None, pick=lambda s, h: h[:, h.shape[1] - 1]),
    "last by narrow": kind(None, pick=lambda s, h: h[:, -1:, :].reshape(1, WIDTH)),
    "last state": kind(None, recur=lambda s, x: s.gru(x)[1], pick=lambda s, h: h[-1]),
    "scores of all events": kind(None, pick=lambda s, h: h),
    "scores of all events, the last": kind(None, pick=lambda s, h: h,
                                           score=lambda s, h: Base.score(s, h)[:, -1]),
    "last 5 scores, the last": kind(None, pick=lambda s, h: h[:, -1:],
                                    score=lambda s, h: Base.score(s, h)[:, 0]),
    "a vector alone": kind(None, score=lambda s, h: h, no_bias=True),
    "scores and probabilities": kind(None, forward=two_outputs),
    "residual": kind(None, recur=residual),
    "norm and feed-forward": kind(
        None, Tower, recur=lambda s, x: s.norm(s.down(torch.tanh(s.up(s.gru(x)[0]))))),
    "linear and linear": kind(None, Tower, recur=lambda s, x: s.down(s.up(s.gru(x)[0]))),
    "a layer as wide as the catalogue": kind(
        None, Tower, recur=lambda s, x: s.gru(x)[0] @ s.embedding.weight.T @ s.embedding.weight),
    "scaled embedding as a weight": kind(None, embed=lambda s, i: nn.functional.embedding(
        i, s.embedding.weight * 2)),
    "items that share a vector": kind(None, score=lambda s, h: h @ s.embedding(
        torch.arange(ITEMS) % 7).T),
    "time first": kind(None, shape=(3, 1), dynamic={"history": {0: "events"}},
                       embed=lambda s, i: s.embedding(i).transpose(0, 1)),
    "a list": kind(None, shape=(3,), dynamic={"history": {0: "events"}},
                   embed=lambda s, i: s.embedding(i).unsqueeze(0)),
    "fixed length": kind(None, shape=(1, 6), dynamic={}),
    # Refused: the history.
    "history reversed": kind(INDICES, embed=lambda s, i: s.embedding(i.flip(1))),
    "last two events": kind(INDICES, embed=lambda s, i: s.embedding(i[:, -2:])),
    "last fifty events": kind(INDICES, embed=lambda s, i: s.embedding(i[:, -50:])),
    "first fifty events": kind(INDICES, embed=lambda s, i: s.embedding(i[:, :50])),
    "without the last event": kind(INDICES, embed=lambda s, i: s.embedding(
        torch.cat([i[:, :1], i[:, :-1]], 1))),
    "every other event": kind(INDICES, embed=lambda s, i: s.embedding(i[:, ::2])),
    "index clipped": kind(INDICES, embed=lambda s, i: s.embedding(i.clamp(max=ITEMS - 2))),
    "index clipped nowhere seen": kind(INDICES, embed=lambda s, i: s.embedding(i.clamp(max=10**6))),
    "index hashed": kind(INDICES, embed=lambda s, i: s.embedding(i % 7)),
    "index shifted": kind(INDICES, embed=lambda s, i: s.embedding((i + 1) % ITEMS)),
    "index looked up": kind("does not gather rows of an embedding: of remap", Tower,
                            embed=lambda s, i: s.embedding(s.remap[i])),
    "history doubled": kind(INDICES, embed=lambda s, i: s.embedding(torch.cat([i, i], 1))),
    "history sorted": kind(INDICES, embed=lambda s, i: s.embedding(i.sort(1)[0])),
    "index as bytes": kind("type that does not hold",
                           embed=lambda s, i: s.embedding(i.to(torch.uint8).long())),
    "two inputs": kind("inputs are 'history', 'more'", names=["history", "more"],
                       forward=lambda s, i, j: Base.forward(s, torch.cat([i, j], 1))),
    # Refused: the vectors.
    "embeddings reversed": kind("Slice", embed=lambda s, i: s.embedding(i).flip(1)),
    "embeddings of the last two": kind("last event", embed=lambda s, i: s.embedding(i)[:, -2:]),
    "embeddings of the last fifty": kind("Slice '", embed=lambda s, i: s.embedding(i)[:, -50:]),
    "the last embedding alone": kind("last event alone", embed=lambda s, i: s.embedding(i)[:, -1:]),
    "the first event's vector": kind("something else than the last event",
                                     pick=lambda s, h: h[:, 0]),
    "the event before the last": kind("Concat",
                                      pick=lambda s, h: torch.cat([h, h], 1)[:, -2]),
    "mean of events": kind("ReduceMean", pick=lambda s, h: h.mean(1)),
    "largest of events": kind("ReduceMax", pick=lambda s, h: h.max(1)[0]),
    "masked by index": kind(INDICES, embed=lambda s, i: s.embedding(i) * (
        i != 3).unsqueeze(-1).float()),
    "learnt first state": kind("state other than zero", Tower, recur=lambda s, x: s.gru(
        x, s.first.expand(1, x.shape[0], WIDTH).contiguous())[0]),
    "state of the second GRU": kind("state other than zero", layers=2, recur=lambda s, x: s.gru(
        x, torch.ones(2, 1, WIDTH))[0]),
    "positions": kind("as position embeddings do", Tower, embed=lambda s, i: s.embedding(i) + s.position(
        torch.arange(i.shape[1]).unsqueeze(0))),
    "scaled by position": kind("Mul", embed=lambda s, i: s.embedding(i) * torch.arange(
        1, i.shape[1] + 1).float().reshape(1, -1, 1)),
    "doubled vectors": kind("Mul", embed=lambda s, i: s.embedding(i) * 2),
    "vectors of length one": kind("no counterpart", pick=lambda s, h: nn.functional.normalize(
        h[:, -1], dim=-1)),
    "LSTM": kind("LSTM", Tower, recur=lambda s, x: s.lstm(x)[0]),
    "both directions": kind("bidirectional", Tower, recur=lambda s, x: s.both(x)[0]),
    "attention": kind("Transpose", recur=lambda s, x: torch.softmax(
        x @ x.transpose(1, 2), -1) @ s.gru(x)[0]),
    "leaky": kind("LeakyRelu", recur=lambda s, x: nn.functional.leaky_relu(s.gru(x)[0])),
    "PReLU": kind("PRelu", Tower, recur=lambda s, x: s.prelu(s.gru(x)[0])),
    "epsilon": kind("epsilon", recur=lambda s, x: nn.functional.layer_norm(
        s.gru(x)[0], (WIDTH,), torch.ones(WIDTH), torch.ones(WIDTH), eps=1e-2)),
    # Refused: the scores.
    "negated": kind("Neg '/Neg': " + SCORES, score=lambda s, h: -Base.score(s, h)),
    "subtracted from": kind("Sub '/Sub': " + SCORES, score=lambda s, h: 3 - Base.score(s, h)),
    "times a negative": kind("Mul '/Mul': " + SCORES, score=lambda s, h: Base.score(s, h) * -2.0),
    "divided by popularity": kind("Div", score=lambda s, h: Base.score(s, h) / s.extra.exp()),
    "clipped scores": kind(SCORES, score=lambda s, h: Base.score(s, h).clamp(min=0)),
    "absolute scores": kind(SCORES, score=lambda s, h: Base.score(s, h).abs()),
    "seen items masked": kind("ScatterElements", forward=lambda s, i: Base.forward(s, i).scatter(
        1, i, -1e9)),
    "softmax, then a bias": kind(SCORES, score=lambda s, h: torch.softmax(
        Base.score(s, h), 1) + s.extra),
    "softmax over events": kind("another axis", pick=lambda s, h: h,
                                score=lambda s, h: torch.softmax(Base.score(s, h), 1)[:, -1]),
    "items turned round": kind("all items in order", score=lambda s, h: Base.score(
        s, h).flip(1)),
    "some items": kind("all items in order", score=lambda s, h: Base.score(s, h)[:, 3:]),
    "distances": kind("Sub", score=lambda s, h: ((
        h.unsqueeze(1) - s.embedding.weight) ** 2).sum(-1)),
    "two heads": kind("both have a score for each item", forward=two_heads),
    "negated beside a vector": kind("Neg", forward=scores_negated_and_vector),
}


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def run(personalize, name, graph, folder):
    torch.manual_seed(len(name))
    case = graph().eval()
    case.embedding.weight[:graph.padding] = 0
    model = folder / "model.onnx"
    inputs = tuple(torch.ones(graph.shape, dtype=torch.long) for _ in graph.names)
    torch.onnx.export(case, inputs, model, input_names=graph.names, dynamic_axes=graph.dynamic,
                      opset_version=14)
    rng = np.random.default_rng(1)
    fixed = None if graph.dynamic else graph.shape[-1]
    histories = [rng.integers(ITEMS, size=fixed or 1 + n % LONGEST) for n in range(20)]
    arguments = [personalize, "convert", "--from", model, "--items", folder / "items.csv",
                 "--element-type", "f32", "-o", folder / "model.pzm"]
    (folder / "model.pzm").unlink(missing_ok=True)
    if graph.expected is None:
        scores = []
        for history in histories:
            shape = [len(history) if size == 3 or size == fixed else size for size in graph.shape]
            out = case(torch.from_numpy(history + graph.padding).reshape(shape))
            out = (out[0] if isinstance(out, tuple) else out).reshape(-1)
            if hasattr(graph, "no_bias"):
                out = case.embedding.weight @ out
            scores.append(out[-ITEMS:].double())
        np.savez(folder / "reference.npz", scores=torch.stack(scores).detach())
        write_csv(folder / "histories.csv", [["USER_ID", "ITEM_ID", "TIMESTAMP"]] + [
            [f"u{u}", f"i{item}", t] for u, h in enumerate(histories) for t, item in enumerate(h)])
        arguments += ["--check", folder / "histories.csv", "--reference",
                      folder / "reference.npz"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if graph.expected is None:
        right = done.returncode == 0 and done.stdout.count("100.0 %") == 3
    else:
        right = (done.returncode == 1 and len(done.stderr.splitlines()) == 1 and
                 re.search(graph.expected, done.stderr) and not (folder / "model.pzm").exists())
    text = (done.stderr or done.stdout).replace(str(folder), "").strip()
    print(f"{'ok' if right else 'WRONG'}: {name}: {text[:300]}", flush=True)
    return bool(right)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True)
    write_csv(folder / "items.csv", [["ITEM_ID"]] + [[f"i{i}"] for i in range(ITEMS)])
    with torch.no_grad():
        wrong = [name for name, graph in GRAPHS.items()
                 if not run(sys.argv[1], name, graph, folder)]
    assert not wrong, wrong
    print(f"{len(GRAPHS)} graphs convert or are refused as they should be")


main()

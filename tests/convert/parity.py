#!/usr/bin/env python3
"""Converts models of every known architecture from every format and compares hidden states and
rankings with PyTorch's.

usage: parity.py PERSONALIZE FOLDER GOLDEN.pzm
"""
import csv
import json
import pathlib
import struct
import subprocess
import sys
import warnings

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tools" / "convert"))
from example import save_safetensors  # noqa: E402

ITEMS, HISTORIES, LONGEST = 150, 200, 30
gelu = nn.functional.gelu


class Case(nn.Module):
    """run(history) gives hidden [events, d] and the scores of all rows behind the last event."""
    padding = 0      # rows in front of the first item's
    options = ()     # of personalize convert
    mapping = None
    onnx = ()        # operator sets
    protocols = ()   # of pickle, beside PyTorch's own 2

    def run(self, history):
        raise NotImplementedError

    def forward(self, history):  # [1, events] -> [1, rows], as an ONNX file holds it
        return self.run(history[0])[1].unsqueeze(0)

    def state(self):
        return self.state_dict()

    def checkpoint(self):
        return self.state_dict()


class TorchGru(Case):
    onnx = (14,)
    protocols = (0, 1, 4, 5)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ITEMS, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.bias = nn.Parameter(torch.randn(ITEMS))

    def forward(self, history):
        hidden, _ = self.gru(self.embedding(history))
        return hidden[:, -1] @ self.embedding.weight.T + self.bias

    def run(self, history):
        hidden, _ = self.gru(self.embedding(history.unsqueeze(0)))
        return hidden[0], self.forward(history.unsqueeze(0))[0]


class TorchGruHalf(TorchGru):
    """Weights kept in half precision, some transposed in memory."""
    onnx = protocols = ()

    def __init__(self):
        super().__init__()
        for parameter in self.parameters():
            parameter.data = parameter.data.half().float()

    def state(self):
        return {name: t.half().T.contiguous().T for name, t in self.state_dict().items()}

    checkpoint = state


class TorchGruSeparate(Case):
    """Two layers, another width, an output layer of its own, a row of padding."""
    padding = 1
    onnx = (14,)

    def __init__(self, layers=2):
        super().__init__()
        self.item_emb = nn.Embedding(ITEMS + 1, 24, padding_idx=0)
        self.gru = nn.GRU(24, 40, num_layers=layers, batch_first=True)
        self.out = nn.Linear(40, ITEMS + 1)

    def forward(self, history):
        return self.out(self.gru(self.item_emb(history))[0][:, -1])

    def run(self, history):
        hidden = self.gru(self.item_emb(history.unsqueeze(0)))[0][0]
        return hidden, self.out(hidden[-1])

    def checkpoint(self):
        return {"epoch": 7, "model_state_dict": self.state_dict(), "optimizer": {"lr": 0.1}}


class TorchGruCells(Case):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ITEMS, 24)
        self.cells = nn.ModuleList([nn.GRUCell(24, 40), nn.GRUCell(40, 32)])
        self.project = nn.Linear(32, 24)

    def run(self, history):
        states = [torch.zeros(1, cell.hidden_size) for cell in self.cells]
        for event in history:
            x = self.emb(event.unsqueeze(0))
            for c, cell in enumerate(self.cells):
                x = states[c] = cell(x, states[c])
        hidden = self.project(x)
        return hidden, (hidden @ self.emb.weight.T)[0]


class Gru4Rec(Case):
    """Its authors' PyTorch version, with the parameters' names and equations of their code."""

    def __init__(self, embedding=0, layers=(36, 28), shared=True):
        super().__init__()
        self.shared = shared
        layers = (layers[-1],) * len(layers) if shared else layers
        width = layers[-1] if shared else embedding
        if not shared and embedding:
            self.E = nn.Embedding(ITEMS, embedding)
        self.G = nn.ModuleList()
        for layer in layers:
            self.G.append(nn.GRUCell(width, layer))
            width = layer
        self.Wy = nn.Embedding(ITEMS, width)
        self.By = nn.Embedding(ITEMS, 1)

    def run(self, history):
        states = [torch.zeros(1, cell.hidden_size) for cell in self.G]
        for event in history:
            x = (self.Wy if self.shared else self.E)(event.unsqueeze(0))
            for c, cell in enumerate(self.G):
                x = states[c] = cell(x, states[c])
        return x, (x @ self.Wy.weight.T + self.By.weight.T)[0]


class Gru4RecSeparate(Gru4Rec):
    def __init__(self):
        super().__init__(embedding=20, shared=False)


class GruEmbedding(nn.Module):
    """Older versions: the reset gate applies to the state."""

    def __init__(self, width):
        super().__init__()
        self.Wx0 = nn.Embedding(ITEMS, 3 * width)
        self.Wrz0 = nn.Parameter(torch.randn(width, 2 * width) * width ** -0.5)
        self.Wh0 = nn.Parameter(torch.randn(width, width) * width ** -0.5)
        self.Bh0 = nn.Parameter(torch.randn(3 * width) * 0.3)

    def forward(self, item, h):
        x, x_r, x_z = (self.Wx0(item) + self.Bh0).chunk(3, 1)
        h_r, h_z = (h @ self.Wrz0).chunk(2, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        return (1 - z) * h + z * torch.tanh((r * h) @ self.Wh0 + x)


class GruEmbeddingResetAfter(nn.Module):
    """Newer versions: one matrix, and the reset gate applies to its product."""

    def __init__(self, width):
        super().__init__()
        self.Wx0 = nn.Embedding(ITEMS, 3 * width)
        self.Wh0 = nn.Parameter(torch.randn(width, 3 * width) * width ** -0.5)
        self.Bh0 = nn.Parameter(torch.randn(3 * width) * 0.3)

    def forward(self, item, h):
        x, x_r, x_z = (self.Wx0(item) + self.Bh0).chunk(3, 1)
        h_x, h_r, h_z = (h @ self.Wh0).chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        return (1 - z) * h + z * torch.tanh(r * h_x + x)


class Gru4RecOneHot(Case):
    def __init__(self, embedding=GruEmbedding):
        super().__init__()
        self.GE = embedding(36)
        self.G = nn.ModuleList([nn.GRUCell(36, 28)])
        self.Wy = nn.Embedding(ITEMS, 28)
        self.By = nn.Embedding(ITEMS, 1)

    def run(self, history):
        first, second = torch.zeros(1, 36), torch.zeros(1, 28)
        for event in history:
            first = self.GE(event.unsqueeze(0), first)
            second = self.G[0](first, second)
        return second, (second @ self.Wy.weight.T + self.By.weight.T)[0]


class Gru4RecOneHotResetAfter(Gru4RecOneHot):
    def __init__(self):
        super().__init__(GruEmbeddingResetAfter)


class RecBole(Case):
    padding = 1
    onnx = (14,)

    def __init__(self):
        super().__init__()
        self.item_embedding = nn.Embedding(ITEMS + 1, 24, padding_idx=0)
        self.gru_layers = nn.GRU(24, 40, num_layers=1, bias=False, batch_first=True)
        self.dense = nn.Linear(40, 24)

    def forward(self, history):
        hidden = self.dense(self.gru_layers(self.item_embedding(history))[0])[:, -1]
        return hidden @ self.item_embedding.weight.T

    def run(self, history):
        hidden = self.dense(self.gru_layers(self.item_embedding(history.unsqueeze(0)))[0])[0]
        return hidden, self.forward(history.unsqueeze(0))[0]

    def checkpoint(self):
        return {"epoch": 3, "state_dict": self.state_dict(), "other_parameter": None}


class Trainer(Case):
    """The network of `personalize train`, its parameters named as there."""
    onnx = (14, 17)

    def __init__(self, layers=2, feed_forward=True):
        super().__init__()
        self.layers, self.feed_forward = layers, feed_forward
        self.item_embedding = nn.Parameter(torch.randn(ITEMS, 32))
        self.item_bias = nn.Parameter(torch.randn(ITEMS))
        self.norm = nn.LayerNorm(32)
        self.grus = nn.ModuleList([nn.GRU(32, 32, batch_first=True) for _ in range(2)])
        self.linear1 = nn.ModuleList([nn.Linear(32, 64) for _ in range(2)])
        self.linear2 = nn.ModuleList([nn.Linear(64, 32) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(4)])

    def hidden(self, history):
        x = self.norm(nn.functional.embedding(history, self.item_embedding))
        for k in range(self.layers):
            x = self.norms[2 * k](x + self.grus[k](x)[0])
            if self.feed_forward:
                x = self.norms[2 * k + 1](x + self.linear2[k](gelu(self.linear1[k](x))))
        return x

    def forward(self, history):
        return self.hidden(history)[:, -1] @ self.item_embedding.T + self.item_bias

    def run(self, history):
        return self.hidden(history.unsqueeze(0))[0], self.forward(history.unsqueeze(0))[0]

    def state(self):
        state = {"item_embedding": self.item_embedding, "item_bias": self.item_bias,
                 "norm.weight": self.norm.weight, "norm.bias": self.norm.bias}
        for k in range(self.layers):
            for ours, theirs in (("w_ih", "weight_ih_l0"), ("w_hh", "weight_hh_l0"),
                                 ("b_ih", "bias_ih_l0"), ("b_hh", "bias_hh_l0")):
                state[f"layer{k}.{ours}"] = getattr(self.grus[k], theirs)
            modules = {"norm1": self.norms[2 * k]}
            if self.feed_forward:
                modules |= {"norm2": self.norms[2 * k + 1], "linear1": self.linear1[k],
                            "linear2": self.linear2[k]}
            for name, module in modules.items():
                state[f"layer{k}.{name}.weight"] = module.weight
                state[f"layer{k}.{name}.bias"] = module.bias
        return {name: tensor.detach() for name, tensor in state.items()}

    checkpoint = state


class MatrixFactorisation(Case):
    def __init__(self):
        super().__init__()
        self.user_factors = nn.Embedding(HISTORIES, 24)
        self.item_factors = nn.Embedding(ITEMS, 24)
        self.user_biases = nn.Embedding(HISTORIES, 1)
        self.item_biases = nn.Embedding(ITEMS, 1)
        self.user = 0

    def run(self, history):  # the user's vector, whatever the history
        hidden = self.user_factors.weight[self.user:self.user + 1]
        self.user += 1
        return hidden, (hidden @ self.item_factors.weight.T + self.item_biases.weight.T)[0]


class Lru(nn.Module):
    def __init__(self, width):
        super().__init__()
        size = torch.sqrt(torch.rand(2 * width) * (0.99 ** 2 - 0.8 ** 2) + 0.8 ** 2)
        angle = torch.rand(2 * width) * 2 * np.pi
        self.params_log = nn.Parameter(torch.stack(
            [torch.log(-torch.log(size)), torch.log(angle), torch.log(torch.sqrt(1 - size ** 2))]))
        self.in_proj = nn.Linear(width, 2 * width).to(torch.cfloat)
        self.out_proj = nn.Linear(2 * width, width).to(torch.cfloat)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x):
        nu, theta, gamma = torch.exp(self.params_log).split((1, 1, 1))
        lamb = torch.exp(torch.complex(-nu, theta))[0]
        steps = self.in_proj(x.to(torch.cfloat)) * gamma
        state, states = torch.zeros_like(lamb), []
        for step in steps:
            state = lamb * state + step
            states.append(state)
        return self.layer_norm(self.out_proj(torch.stack(states)).real + x)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.layer_norm(self.w_2(gelu(self.w_1(x))) + x)


class LruRec(Case):
    """Names and equations of the LRURec authors' code, step by step instead of in parallel."""
    padding = 1

    def __init__(self, blocks=2):
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.token = nn.Embedding(ITEMS + 1, 32)
        self.embedding.layer_norm = nn.LayerNorm(32)
        self.model = nn.Module()
        self.model.bias = nn.Parameter(torch.randn(ITEMS + 1))
        self.model.lru_blocks = nn.ModuleList()
        for _ in range(blocks):
            block = nn.Module()
            block.lru_layer, block.feed_forward = Lru(32), FeedForward(32)
            self.model.lru_blocks.append(block)

    def run(self, history):
        x = self.embedding.layer_norm(self.embedding.token(history))
        for block in self.model.lru_blocks:
            x = block.feed_forward(block.lru_layer(x))
        return x, x[-1] @ self.embedding.token.weight.T + self.model.bias


class Keras(Case):
    """keras.layers.GRU: gates z, r, h side by side in [inputs, 3 units]."""
    reset_after = True

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(ITEMS + 1, 24))
        self.kernel = nn.Parameter(torch.randn(24, 3 * 32) * 0.2)
        self.recurrent = nn.Parameter(torch.randn(32, 3 * 32) * 0.2)
        self.bias = nn.Parameter(torch.randn(*([2] if self.reset_after else []), 3 * 32) * 0.2)
        self.dense_kernel = nn.Parameter(torch.randn(32, ITEMS + 1))
        self.dense_bias = nn.Parameter(torch.randn(ITEMS + 1))
        self.padding = 1

    @property
    def mapping(self):
        bias = "gru/bias"
        layer = {"type": "gru", "gate_order": "zrh", "transpose": True,
                 "reset_after": self.reset_after, "w_ih": "gru/kernel",
                 "w_hh": "gru/recurrent_kernel"}
        layer |= ({"b_ih": {"tensor": bias, "slice": [0, 1]},
                   "b_hh": {"tensor": bias, "slice": [1, 2]}} if self.reset_after
                  else {"b_ih": bias})
        return {"embedding": "embedding/embeddings",
                "output": {"tensor": "dense/kernel", "transpose": True},
                "output_bias": "dense/bias", "index_offset": 1, "layers": [layer]}

    def state(self):
        return {"embedding/embeddings": self.embeddings.detach(),
                "gru/kernel": self.kernel.detach(),
                "gru/recurrent_kernel": self.recurrent.detach(), "gru/bias": self.bias.detach(),
                "dense/kernel": self.dense_kernel.detach(),
                "dense/bias": self.dense_bias.detach()}

    checkpoint = state

    def run(self, history):
        h = torch.zeros(32)
        for event in history:
            if self.reset_after:
                x = self.embeddings[event] @ self.kernel + self.bias[0]
                z, r, n = (x + 0).chunk(3)
                h_z, h_r, h_n = (h @ self.recurrent + self.bias[1]).chunk(3)
                z, r = torch.sigmoid(z + h_z), torch.sigmoid(r + h_r)
                n = torch.tanh(n + r * h_n)
            else:
                z, r, n = (self.embeddings[event] @ self.kernel + self.bias).chunk(3)
                w_z, w_r, w_n = self.recurrent.chunk(3, 1)
                z, r = torch.sigmoid(z + h @ w_z), torch.sigmoid(r + h @ w_r)
                n = torch.tanh(n + (r * h) @ w_n)
            h = z * h + (1 - z) * n
        return h.unsqueeze(0), h @ self.dense_kernel + self.dense_bias


class KerasResetBefore(Keras):
    reset_after = False


CASES = [TorchGru, TorchGruHalf, TorchGruSeparate, TorchGruCells, Gru4Rec, Gru4RecSeparate,
         Gru4RecOneHot, Gru4RecOneHotResetAfter, RecBole, Trainer, MatrixFactorisation, LruRec, Keras, KerasResetBefore]

def read_safetensors(path):
    data = path.read_bytes()
    length, = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + length])
    types = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: np.frombuffer(data[8 + length:][t["data_offsets"][0]:t["data_offsets"][1]],
                            types[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()}


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def save(case, folder):
    """Every format that can hold the case; the files' paths."""
    state = case.state()
    save_safetensors(state, folder / "model.safetensors")
    np.savez(folder / "model.npz", **{name: np.asarray(t.numpy(), order="A")
                                      for name, t in state.items()})
    np.savez_compressed(folder / "compressed.npz", **{n: t.numpy() for n, t in state.items()})
    torch.save(case.checkpoint(), folder / "model.pt")
    torch.save(case.checkpoint(), folder / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in case.protocols:
        torch.save(case.checkpoint(), folder / f"{protocol}.pt", pickle_protocol=protocol)
        torch.save(case.checkpoint(), folder / f"old{protocol}.pt", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=False)
    for opset in case.onnx:
        torch.onnx.export(case, torch.zeros(1, 3, dtype=torch.long), folder / f"{opset}.onnx",
                          input_names=["history"], output_names=["scores"],
                          dynamic_axes={"history": {1: "events"}}, opset_version=opset)
    return sorted(path for path in folder.iterdir())


def sections(path):
    """{(tag, index): the rest of its table entry but the offset, stored bytes}; of the metadata,
    what it says but for the provenance."""
    data = path.read_bytes()
    count, = struct.unpack_from("<I", data, 12)
    inspected = subprocess.run([sys.argv[1], "inspect", "--json", path], capture_output=True,
                               check=True)
    metadata = json.loads(inspected.stdout)["metadata"]
    assert metadata.pop("provenance")["source"]
    found = {"metadata": metadata}
    for at in range(64, 64 + 72 * count, 72):
        tag, index = struct.unpack_from("<4sI", data, at)
        offset, size = struct.unpack_from("<QQ", data, at + 40)
        if tag == b"META":
            continue
        found[tag, index] = data[at + 8:at + 40], data[offset:offset + size]
    assert len(found) > 5
    return found


def personalize(*arguments, fails=False):
    done = subprocess.run([sys.argv[1], "convert", *map(str, arguments)], capture_output=True,
                          text=True)
    assert (done.returncode == 1) == fails and done.returncode < 2, (arguments, done)
    return done.stderr if fails else json.loads(done.stdout)


def require_parity(report, what):
    checks = report["checks"]
    for check in checks:
        assert check["histories"] == HISTORIES, (what, check)
        assert check.get("hidden_deviation", 0) <= 1e-4, (what, check)
        assert check["same_top20"] == 1, (what, check)
    assert "hidden_deviation" in checks[-1]
    return max(c.get("hidden_deviation", 0) for c in checks)


def run_case(kind, root):
    torch.manual_seed(len(kind.__name__))
    case = kind().eval()
    with torch.no_grad():
        # Away from where layer norms and padding start.
        for name, parameter in case.named_parameters():
            if "norm" in name:
                parameter += torch.randn_like(parameter) * 0.3
    rng = np.random.default_rng(1)
    folder = root / kind.__name__
    folder.mkdir()
    files = save(case, folder)
    histories = [rng.integers(ITEMS, size=rng.integers(1, LONGEST + 1)) for _ in range(HISTORIES)]
    hidden, scores = [], []
    for history in histories:
        h, s = case.run(torch.from_numpy(history + case.padding))
        hidden.append(h[-1])
        scores.append(s[case.padding:])
    np.savez(folder / "reference.npz", hidden=torch.stack(hidden), scores=torch.stack(scores))
    write_csv(folder / "histories.csv", [["USER_ID", "ITEM_ID", "TIMESTAMP"]] + [
        [f"u{u}", f"i{item}", t] for u, h in enumerate(histories) for t, item in enumerate(h)])
    write_csv(folder / "items.csv", [["ITEM_ID", "GENRE"]] + [
        [f"i{i}", f"g{i % 7}"] for i in range(ITEMS)])
    options = ["--items", folder / "items.csv", "--interactions", folder / "histories.csv",
               "--element-type", "f32", "--json"]
    if kind is MatrixFactorisation:
        write_csv(folder / "users.csv", [["USER_ID"]] + [[f"u{u}"] for u in range(HISTORIES)])
        options += ["--users", folder / "users.csv"]
    if case.mapping:
        (folder / "mapping.json").write_text(json.dumps(case.mapping))
        options += ["--mapping", folder / "mapping.json"]
    check = ["--check", folder / "histories.csv", "--reference", folder / "reference.npz"]
    worst, converted = 0, []
    for path in files:
        output = pathlib.Path(f"{path}.pzm")
        report = personalize("--from", path, *options, *check, "-o", output)
        assert report["items"] == ITEMS
        assert len(report["checks"]) == (3 if path.suffix == ".onnx" else 2), report
        worst = max(worst, require_parity(report, path))
        converted.append(output)
    for other in converted[1:]:
        assert sections(other) == sections(converted[0]), f"{other} differs from {converted[0]}"

    # Out and in again.
    personalize("--from", converted[0], "--to", "safetensors", "-o", folder / "out.safetensors",
                "--json")
    personalize("--from", folder / "out.safetensors", "--element-type", "f32", "-o",
                folder / "again.pzm", "--json")
    assert (folder / "again.pzm").read_bytes() == converted[0].read_bytes(), "round trip"
    print(f"{kind.__name__}: {len(files)} files, hidden states within {worst:.2g}", flush=True)
    return folder, files[0]


def run_readme(root):
    """The examples of tools/convert/README.md, in its order, say what is recognised anyhow."""
    readme = pathlib.Path(__file__).resolve().parents[2] / "tools" / "convert" / "README.md"
    examples = [json.loads(block.split("```")[0])
                for block in readme.read_text().split("```json")[1:]]
    cases = [TorchGruSeparate(layers=1), Gru4RecOneHot(),
             Gru4Rec(embedding=20, layers=(28,), shared=False), RecBole(), Keras(),
             MatrixFactorisation(), LruRec(blocks=1), Trainer(layers=1, feed_forward=False)]
    assert len(examples) == len(cases)
    folder = root / "readme"
    folder.mkdir()
    write_csv(folder / "items.csv", [["ITEM_ID"]] + [[f"i{i}"] for i in range(ITEMS)])
    write_csv(folder / "users.csv", [["USER_ID"]] + [[f"u{u}"] for u in range(HISTORIES)])
    for example, case in zip(examples, cases):
        if case.mapping:
            assert example == case.mapping, type(case)
            continue
        save_safetensors(case.state(), folder / "model.safetensors")
        (folder / "mapping.json").write_text(json.dumps(example))
        common = ["--from", folder / "model.safetensors", "--items", folder / "items.csv",
                  "--element-type", "f32", "--json", "-o"]
        personalize(*common, folder / "mapped.pzm", "--mapping", folder / "mapping.json")
        personalize(*common, folder / "recognised.pzm",
                    *(["--users", folder / "users.csv"] if "users" in example else []))
        assert sections(folder / "mapped.pzm") == sections(folder / "recognised.pzm"), type(case)
    print(f"{len(examples)} examples of the README convert as what is recognised", flush=True)


def run_archive(metadata, tensors, item, event_type, time_gap):
    """The hidden state behind a history, from what --to safetensors writes."""
    assert metadata["format"] == "personalize"
    t = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    states, saved = {}, {}
    for events in zip(item, event_type, time_gap):
        weights = iter(t[f"encoder.weights.{k}"] for k in range(len(t)))
        for number, (kind, argument) in enumerate(t["encoder.operations"].tolist()):
            if kind == 1:
                x = t["item_vectors"][events[0]] + t["time_gap_embedding"][events[2]]
                x = x + (t["event_type_embedding"][events[1]] if events[1] >= 0 else 0)
            elif kind == 2:
                x = next(weights) @ x + next(weights)[0]
            elif kind == 3:
                w_ih, w_hh, b_ih, b_hh = (next(weights) for _ in range(4))
                h = states.get(number, torch.zeros(w_hh.shape[1]))
                x = states[number] = torch.gru_cell(x[None], h[None], w_ih, w_hh, b_ih[0],
                                                    b_hh[0])[0]
            elif kind == 4:
                x = nn.functional.layer_norm(x, x.shape, next(weights)[0], next(weights)[0])
            elif kind == 5:
                x = [torch.sigmoid, torch.tanh, torch.relu, gelu][argument - 1](x)
            elif kind == 6:
                saved[argument] = x
            elif kind == 7:
                x = x + saved[argument]
            else:
                raise AssertionError(kind)
    return x, t["item_vectors"] @ x + t["biases"]


def strings(values):
    count = 0
    data = values.tobytes()
    lengths = []
    while sum(lengths) + 2 * count < len(data):
        lengths.append(struct.unpack_from("<H", data, 2 * count)[0])
        count += 1
    ends = np.cumsum([2 * count, *lengths])
    return [data[a:b].decode() for a, b in zip(ends, ends[1:])]


def run_golden(golden, root):
    """A model of `personalize train`'s kind: event types, time gaps, every operation."""
    out = root / "golden.safetensors"
    personalize("--from", golden, "--to", "safetensors", "-o", out, "--json")
    metadata, tensors = read_safetensors(out)
    items, types = strings(tensors["item_ids"]), strings(tensors["event_types"])
    buckets = len(tensors["time_gap_embedding"])
    rng = np.random.default_rng(2)
    rows, hidden, scores = [["USER_ID", "ITEM_ID", "EVENT_TYPE", "TIMESTAMP"]], [], []
    for user in range(HISTORIES):
        length = rng.integers(1, LONGEST + 1)
        item = rng.integers(len(items), size=length)
        event_type = rng.integers(-1, len(types), size=length)
        time = 1_600_000_000 + np.cumsum((2 ** rng.uniform(0, 20, length)).astype(np.int64))
        gaps = [0] + [1 + min(int(b - a + 1).bit_length() - 1, buckets - 2)
                      for a, b in zip(time, time[1:])]
        h, s = run_archive(metadata, tensors, item, event_type, gaps)
        hidden.append(h)
        scores.append(s)
        rows += [[user, items[i], "" if e < 0 else types[e], t]
                 for i, e, t in zip(item, event_type, time)]
    np.savez(root / "golden.npz", hidden=torch.stack(hidden), scores=torch.stack(scores))
    write_csv(root / "golden.csv", rows)
    report = personalize("--from", out, "--element-type", "f32", "--check", root / "golden.csv",
                         "--reference", root / "golden.npz", "-o", root / "golden.pzm", "--json")
    print(f"a trained model through safetensors: within {require_parity(report, golden):.2g}")


def run_negative(folder, source):
    """What must be noticed: other hidden states, items in another order."""
    options = ["--interactions", folder / "histories.csv", "--element-type", "f32", "--json"]
    reference = dict(np.load(folder / "reference.npz"))
    reference["hidden"] = reference["hidden"] * (1 + 3e-4)
    np.savez(folder / "wrong.npz", **reference)
    check = ["--check", folder / "histories.csv", "--reference"]
    message = personalize("--from", source, *options, "--items", folder / "items.csv", *check,
                          folder / "wrong.npz", "-o", folder / "wrong.pzm", fails=True)
    assert "does not agree" in message, message
    # An approximation of the source is no excuse: what it approximates differs.
    personalize("--from", source, "--interactions", folder / "histories.csv", "--json", "--items",
                folder / "items.csv", *check, folder / "wrong.npz", "-o", folder / "wrong.pzm",
                fails=True)
    rows = (folder / "items.csv").read_text().splitlines()
    (folder / "swapped.csv").write_text("\n".join([rows[0], rows[2], rows[1], *rows[3:]]) + "\n")
    message = personalize("--from", source, *options, "--items", folder / "swapped.csv", *check,
                          folder / "reference.npz", "-o", folder / "wrong.pzm", fails=True)
    assert "does not agree" in message, message


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root, golden = map(pathlib.Path, sys.argv[2:])
    root.mkdir(parents=True)
    with torch.no_grad():
        results = [run_case(kind, root) for kind in CASES]
        run_readme(root)
        run_golden(golden, root)
    run_negative(*results[0])


main()

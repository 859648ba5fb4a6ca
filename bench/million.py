#!/usr/bin/env python3
"""Trains a GRU on a catalogue of a million items, for what is measured on trained vectors: their
norms are those that popularity gives them.

usage: million.py PERSONALIZE FOLDER [--epochs E]    (20 minutes on two cores, 3 GB)

There is no public data set of that size to ship, so the interactions are made up: 400,000 users
with 20 events each. An item's popularity falls as 1 / (rank + 20); a fifth of the items is never
seen. Each item belongs to one of 1,000 topics and each user likes three. An event is, by chance,
the usual successor of the one before (25 %), an item of one of the user's topics (60 %) or any item
(15 %). The model is trained as such catalogues are: embeddings of 64 dimensions, for input and
output alike, with a sampled softmax (512 negatives a step, drawn by the root of their popularity,
corrected for it) and Adam, no weight decay.

FOLDER takes model.pt, items.csv, model.pzm (int8) and histories.txt: of 1,000 users who were not
trained on, the items of all events but the last, by index.
"""
import argparse
import pathlib
import subprocess
import time

import numpy as np
import torch
from torch import nn

ITEMS, DIMENSION, TOPICS, USERS, EVENTS = 1_000_000, 64, 1000, 400_000, 20
HELD_OUT, BATCH, NEGATIVES = 1000, 128, 512


def interactions(random):
    """[users, events] of item indices; items are in order of their popularity."""
    popularity = 1 / (np.arange(ITEMS) + 20)
    topic = random.integers(0, TOPICS, ITEMS)
    order = np.lexsort((np.arange(ITEMS), topic))  # by topic, in it by popularity
    below = np.concatenate([[0], np.cumsum(popularity[order])])
    first = np.searchsorted(topic[order], np.arange(TOPICS + 1))
    overall = np.cumsum(popularity) / popularity.sum()
    successor = np.empty(ITEMS, np.int64)
    successor[order] = np.roll(order, -1)
    liked = random.integers(0, TOPICS, (USERS, 3))
    events = np.empty((USERS, EVENTS), np.int64)
    for e in range(EVENTS):
        mine = liked[np.arange(USERS), random.integers(0, 3, USERS)]
        low, high = below[first[mine]], below[first[mine + 1]]
        place = np.searchsorted(below, low + (high - low) * random.random(USERS), side="right") - 1
        events[:, e] = order[np.minimum(place, ITEMS - 1)]
        kind = random.random(USERS)
        anything = np.minimum(np.searchsorted(overall, random.random(USERS)), ITEMS - 1)
        events[:, e] = np.where(kind < 0.15, anything, events[:, e])
        if e > 0:
            events[:, e] = np.where(kind >= 0.75, successor[events[:, e - 1]], events[:, e])
    return events


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ITEMS, DIMENSION, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.gru = nn.GRU(DIMENSION, DIMENSION, batch_first=True)
        self.bias = nn.Embedding(ITEMS, 1, sparse=True)
        nn.init.zeros_(self.bias.weight)

    def forward(self, history):
        return self.gru(self.embedding(history))[0]


def train(events, epochs, random):
    model = Model()
    tables = [*model.embedding.parameters(), *model.bias.parameters()]
    optimizers = [torch.optim.SparseAdam(tables, lr=2e-3),
                  torch.optim.Adam(model.gru.parameters(), lr=1e-3)]
    drawn = np.sqrt(np.bincount(events.numpy()[:-HELD_OUT].ravel(), minlength=ITEMS) + 1.0)
    drawn /= drawn.sum()
    steps = np.cumsum(drawn)
    # Of a sample of this size how many are this item, as a logarithm.
    expected = torch.from_numpy(np.log(drawn * NEGATIVES)).float()
    begin = time.monotonic()
    for epoch in range(epochs):
        total, count = 0.0, 0
        for users in torch.randperm(USERS - HELD_OUT).split(BATCH):
            batch = events[users]
            target = batch[:, 1:].reshape(-1)
            hidden = model(batch[:, :-1]).reshape(-1, DIMENSION)
            negative = torch.from_numpy(
                np.minimum(np.searchsorted(steps, random.random(NEGATIVES)), ITEMS - 1))
            right = (hidden * model.embedding(target)).sum(1) + model.bias(target)[:, 0]
            wrong = hidden @ model.embedding(negative).T + model.bias(negative)[:, 0]
            right, wrong = right - expected[target], wrong - expected[negative]
            wrong = wrong.masked_fill(target[:, None] == negative, -1e9)
            loss = nn.functional.cross_entropy(torch.cat([right[:, None], wrong], 1),
                                               torch.zeros(len(target), dtype=torch.long))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total, count = total + loss.item(), count + 1
        report(model, events, epoch, epochs, total / count, time.monotonic() - begin)
    return model


@torch.no_grad()
def report(model, events, epoch, epochs, loss, seconds):
    held_out = events[-HELD_OUT:]
    scores = model(held_out[:, :-1])[:, -1] @ model.embedding.weight.T + model.bias.weight[:, 0]
    target = held_out[:, -1:]
    rank = (scores > scores.gather(1, target)).sum(1)
    norms = model.embedding.weight.norm(dim=1)
    some = torch.quantile(norms[::4], torch.tensor([0.01, 0.5, 0.99, 1.0]))
    print(f"epoch {epoch + 1} of {epochs}, {seconds:.0f} s: loss {loss:.3f}, "
          f"recall@20 {(rank < 20).float().mean():.3f}, norms: 1 %, 50 %, 99 %, all below "
          f"{', '.join(f'{float(v):.2f}' for v in some)}; their logarithm's standard deviation "
          f"{float(norms.log().std()):.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personalize", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    random = np.random.default_rng(1)
    events = torch.from_numpy(interactions(random))
    model = train(events, options.epochs, random)
    state = model.state_dict()
    state["bias"] = state.pop("bias.weight")[:, 0].clone()
    torch.save(state, options.folder / "model.pt")
    (options.folder / "items.csv").write_text(
        "ITEM_ID\n" + "".join(f"i{i}\n" for i in range(ITEMS)))
    np.savetxt(options.folder / "histories.txt", events.numpy()[-HELD_OUT:, :-1], fmt="%d")
    subprocess.run([options.personalize, "convert", "--from", options.folder / "model.pt",
                    "--items", options.folder / "items.csv", "-o", options.folder / "model.pzm"],
                   check=True)


if __name__ == "__main__":
    main()

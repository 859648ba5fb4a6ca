"""Draws latency against catalogue size from the JSON lines of bench/peers/run.
usage: plot.py LINES.jsonl OUT.svg"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 770, 420, 70, 240, 40, 50
COLOURS = ["#d62728", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f"]


def series(lines):
    found = {}
    for line in lines:
        if line["name"] == "top_100_peer":
            found.setdefault("personalize_runtime (exact)", {}).setdefault(line["items"], []).append(
                line["value"])
            name = line["peer"]
            if name in ("FAISS IVF", "hnswlib"):
                name += " (recall 0.95)"
            found.setdefault(name, {})[line["items"]] = [line["peer_value"]]
        elif line["name"].startswith(("onnx_slate", "torch_slate")):
            name = "ONNX Runtime" if line["name"].startswith("onnx") else "PyTorch"
            found.setdefault(name, {})[line["items"]] = [line["value"]]
    return {name: sorted((n, sorted(v)[len(v) // 2]) for n, v in points.items())
            for name, points in found.items()}


def main(source, out):
    with open(source) as file:
        found = series([json.loads(line) for line in file])
    values = [v for points in found.values() for _, v in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(n):
        return LEFT + (math.log10(n) - 4) / 2 * (WIDTH - LEFT - RIGHT)

    def y(v):
        return HEIGHT - BOTTOM - (math.log10(v) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="14">Top 100 of N items, d = 64: median latency, one thread</text>']
    for power in range(low, high + 1):
        label = f"{10 ** power:g} us" if power < 3 else f"{10 ** (power - 3):g} ms"
        svg += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(10 ** power):.1f}" y2="{y(10 ** power):.1f}" stroke="#ddd"/>',
                f'<text x="{LEFT - 8}" y="{y(10 ** power) + 4:.1f}" text-anchor="end">{label}</text>']
    for n, label in ((10_000, "10,000"), (100_000, "100,000"), (1_000_000, "1,000,000 items")):
        svg.append(f'<text x="{x(n):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>')
    largest = max(n for points in found.values() for n, _ in points)
    labels = []
    for colour, (name, points) in zip(COLOURS, found.items()):
        path = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        svg += [f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for n, v in points]
        # What was not run to the end stands below the others, and says where it ends.
        n, v = points[-1]
        ended = n < largest
        labels.append([ended, y(v), colour, name + f", to {n:,}" * ended])
    labels.sort()
    for above, below in zip(labels, labels[1:]):
        below[1] = max(below[1], above[1] + 15)
    svg += [f'<text x="{WIDTH - RIGHT + 8}" y="{at + 4:.1f}" fill="{colour}">{name}</text>'
            for _, at, colour, name in labels]
    with open(out, "w") as file:
        file.write("\n".join(svg + ["</svg>", ""]))


main(*sys.argv[1:])

"""Passes JSON lines on to standard output and ends with a table of them on standard error."""
import json
import sys

rows = [("figure", "data", "value", "ratio", "to")]
for line in sys.stdin:
    print(line, end="", flush=True)
    figure = json.loads(line)
    peer = figure.get("peer", "")
    if "recall" in figure:
        peer += f", recall {figure['recall']:g}"
    rows.append((figure["name"], figure["data"], f"{figure['value']:g} {figure['unit']}",
                 f"{figure['ratio']:g}" if "ratio" in figure else "", peer))
widths = [max(map(len, column)) for column in zip(*rows)]
for row in rows:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), file=sys.stderr)

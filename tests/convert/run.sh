#!/usr/bin/env bash
# Runs the example, and compares conversions of every architecture and format, and of graphs that do
# something else, with PyTorch.
# usage: tests/convert/run.sh PYTHON PERSONALIZE FOLDER
set -euo pipefail
python=$1
personalize=$2
folder=$3
here=$(dirname "$0")

"$python" -c 'import torch, numpy' 2>/dev/null || {
  echo "SKIPPED: $python has no torch and numpy; install python3-torch and python3-numpy"
  exit 77
}
# Several threads spin while they wait for one another: on a busy machine, ten times as long.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
rm -rf "$folder"
mkdir -p "$folder"
"$personalize" simulate --write-dataset "$folder/data" --users 300 --items 120
"$python" "$here/../../tools/convert/example.py" "$personalize" "$folder/data/interactions.csv" \
  "$folder/example"
"$personalize" evaluate --model "$folder/example/model.onnx.pzm" \
  --interactions "$folder/data/interactions.csv"
"$python" "$here/graphs.py" "$personalize" "$folder/graphs"
"$python" "$here/parity.py" "$personalize" "$folder/models" "$here/../golden/model_v1.pzm"
rm -rf "$folder"

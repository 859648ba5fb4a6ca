#!/usr/bin/env bash
# Writes the reference results with PyTorch and compares each program's with them.
# usage: tests/parity/run.sh PYTHON FOLDER PARITY...
set -euo pipefail
python=$1
folder=$2
shift 2

"$python" -c 'import torch, numpy' 2>/dev/null || {
  echo "SKIPPED: $python has no torch and numpy; install python3-torch and python3-numpy"
  exit 77
}
rm -rf "$folder"
# Several threads spin while they wait for one another: on a busy machine, ten times as long.
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$python" "$(dirname "$0")/reference.py" "$folder"
for parity in "$@"; do
  echo "$(basename "$parity"):"
  "$parity" "$folder"
done
rm -rf "$folder"

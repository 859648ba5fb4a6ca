#!/usr/bin/env python3
"""Inputs as users bring them: runs the cases and compares with what is right.

usage: tests/cases/run.py PERSONALIZE CASES [NAME...]

A case is a folder of CASES with a script `cmd`, which is run in that folder with P, the binary,
and R, the repository. What is right stands beside this file under the folder's name, one
expectation a line:
  exit 0 | exit nonzero      the script's exit status
  says REGEX                 found somewhere in its standard output and error
  silent REGEX               found nowhere there
  ranking ITEM...            user q of histories.csv is recommended these by the model that it wrote
Empty lines and lines that begin with # are comments.
"""
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
# A program of a case is compiled without optimisation, which takes half the time.
COMPILER = '#!/bin/bash\nexec {} "${{@/#-O[123s]/-O0}}"\n'


def ranking(personalize, case, folder, count):
    models = list(folder.glob("*/o.pzm"))
    if not models:
        return "no model was written"
    slate = subprocess.run(
        [personalize, "recommend", "--model", models[0], "-i", "histories.csv", "--user", "q",
         "-n", str(count), "--include-interacted", "--json"],
        cwd=case, capture_output=True, text=True, errors="replace")
    if slate.returncode != 0:
        return slate.stderr.strip()
    return " ".join(pick["item"] for pick in json.loads(slate.stdout)["slate"])


def faults(personalize, case, compiler):
    """What is wrong in one case, a line each."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = dict(os.environ, P=str(personalize), R=str(HERE.parents[1]), TMPDIR=name,
                           PATH=f"{compiler}:{os.environ['PATH']}")
        ran = subprocess.run(["bash", "cmd"], cwd=case, env=environment, text=True,
                             errors="replace", stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = []
        for line in (HERE / case.name).read_text().splitlines():
            kind, _, wanted = line.strip().partition(" ")
            if not kind or kind.startswith("#"):
                continue
            if kind == "exit" and wanted in ("0", "nonzero"):
                if (ran.returncode == 0) != (wanted == "0"):
                    found.append(f"exit status {ran.returncode}, not {wanted}")
            elif kind == "says":
                if not re.search(wanted, ran.stdout):
                    found.append(f"does not say {wanted}")
            elif kind == "silent":
                if re.search(wanted, ran.stdout):
                    found.append(f"says {wanted}")
            elif kind == "ranking":
                got = ranking(personalize, case, folder, len(wanted.split()))
                if got != " ".join(wanted.split()):
                    found.append(f"ranking {got}, not {wanted}")
            else:
                found.append(f"an expectation that is none: {line}")
        return found + ["its output:", *ran.stdout.splitlines()] if found else []


def main():
    personalize, cases = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    if not cases.is_dir():
        print(f"SKIPPED: {sys.argv[2]} is not there")
        return 77
    every = sorted(folder for folder in cases.iterdir() if (folder / "cmd").is_file())
    chosen = [case for case in every if not sys.argv[3:] or case.name in sys.argv[3:]]
    failed = 0
    with tempfile.TemporaryDirectory() as compiler:
        gxx = pathlib.Path(compiler) / "g++"
        gxx.write_text(COMPILER.format(subprocess.getoutput("command -v g++")))
        gxx.chmod(0o755)
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            runs = []
            for case in chosen:
                if (HERE / case.name).is_file():
                    runs.append((case, pool.submit(faults, personalize, case, compiler)))
                else:
                    print(f"SKIPPED: {case.name} has no file in tests/cases")
            for case, run in runs:
                wrong = run.result()
                failed += bool(wrong)
                print("\n    ".join([f"{'FAILED' if wrong else 'ok':7} {case.name}", *wrong]))
    print(f"{len(runs) - failed} of {len(runs)} cases are right")
    return 1 if failed or not runs else 0


if __name__ == "__main__":
    sys.exit(main())

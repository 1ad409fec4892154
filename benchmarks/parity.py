"""Our losses and advantages beside verl's and TRL's own code: values and gradients on one batch in float64. README.md.

    python benchmarks/parity.py [--env FOLDER]

The peers' functions run as they are published, in an environment of their own that is made when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from peers.environment import default_folder, environment

HERE = Path(__file__).resolve().parent
PINS = ("torch==2.13.0", "verl==0.9.1", "trl==1.16.0")
EQUAL = 1e-7
"""Differences below it are rounding: verl adds 1e-8 to lengths, TRL has SAPO's temperatures in float32."""


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| peer | formula | ours | theirs | largest difference of gradient or token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        largest = "equal" if row["largest"] < EQUAL else f"{row['largest']:.2g}"
        lines.append(f"| {row['peer']} | {row['formula']} | {row['ours']:.9f} | {row['theirs']:.9f} | {largest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=default_folder("parity"), help="folder of the peers' environment")
    python = environment(parser.parse_args().env, PINS)
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    command = [str(python), "-W", "ignore", "-m", "peers.formulas"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    print(table(json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main()

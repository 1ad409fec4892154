"""Writes the problems that a run of ours draws, in its order, one a line, so that a peer trains on the same ones.

python -m peers.problems RECIPE SEED COUNT FILE
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibro_lightning.sources.prompts import PromptCursor
from peers.work import built, read_recipe


def drawn(recipe: dict[str, Any], seed: int, count: int) -> list[dict[str, Any]]:
    """The first ``count`` problems of a run with this seed."""
    problems: list[Any] = list(built(recipe["data"]["init_args"]["source"]).problems())
    return [asdict(problem) for _, problem in PromptCursor(problems, seed).draw(count)]


def main(recipe: str, seed: str, count: str, file: str) -> None:
    lines = [json.dumps(problem) + "\n" for problem in drawn(read_recipe(recipe), int(seed), int(count))]
    Path(file).write_text("".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

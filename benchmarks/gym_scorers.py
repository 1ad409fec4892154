"""Which perturbed golds reasoning-gym's scorers refuse as ReasoningGymReward uses them, dataset by dataset.

python benchmarks/gym_scorers.py                  # a table in Markdown; docs/gym_scorers.md holds it; a minute
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

from ibro_lightning.tasks.gym_datasets import generate_entries, make_dataset, score_answer

WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
SLOW = {"composite"}


def names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - SLOW - WITHOUT_GOLD)


def perturbed(gold: str, other: str) -> dict[str, str]:
    """Answers that are no answer to the gold's question, by how they came about."""
    others = {
        "the answer to another question": other,
        "not a number": "nan",
        "a letter": "x",
        "Python's None": "None",
        "the first half": gold[: len(gold) // 2],
        "twice": f"{gold} {gold}",
        "with a word behind it": f"{gold} extra",
        "with a minus sign": f"-{gold}",
        "a number of no question": "8675309",
    }
    return {kind: text for kind, text in others.items() if text.strip() not in ("", gold.strip())}


def scored(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return score_answer(dataset, answer, entry)
    except Exception:  # a scorer that raises has not accepted
        return 0.0


def refused(name: str, count: int) -> tuple[list[str], list[str]]:
    """The kinds of perturbed golds that none of some entries accepts, and the others. Golds must be accepted."""
    random.seed(0)
    config = {"seed": 5, "size": count + 1}
    entries, dataset = generate_entries(name, config, count + 1), make_dataset(name, config)
    accepted: dict[str, int] = {}
    for entry, other in pairwise(entries):
        if "Integral" in entry["answer"]:  # the question itself, which is no answer
            continue
        assert scored(dataset, entry["answer"], entry) == 1.0, (name, entry["answer"])
        for kind, text in perturbed(entry["answer"], other["answer"]).items():
            accepted[kind] = accepted.get(kind, 0) + (scored(dataset, text, entry) >= 1)
    return [kind for kind, times in accepted.items() if not times], [kind for kind, times in accepted.items() if times]


def main() -> None:
    print("| dataset | refuses always | accepts at times |\n| --- | --- | --- |")
    for name in names():
        none, some = refused(name, 5)
        print(f"| `{name}` | {len(none)} kinds | {', '.join(some) or '–'} |", flush=True)


if __name__ == "__main__":
    main()

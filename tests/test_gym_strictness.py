"""reasoning-gym's scorers: golds are right, and what looks like them is not, whatever the library says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gym_scorers import names, refused, scored
from ibro_lightning.tasks.gym_datasets import generate_entries, make_dataset
from ibro_lightning.tasks.gym_strictness import STRICTER


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_dataset_accepts_its_golds_and_refuses_what_is_none(name: str) -> None:
    none, _ = refused(name, 5)
    assert len(none) >= 5


@pytest.mark.parametrize("name", STRICTER)
def test_datasets_whose_scorers_are_lenient_refuse_what_looks_like_a_gold(name: str) -> None:
    none, _ = refused(name, 3)
    assert len(none) >= 5


CASES = [  # dataset, a perturbation of its gold that reasoning-gym gives full marks
    ("coin_flip", lambda gold: "0"),
    ("coin_flip", lambda gold: gold[:3]),
    ("complex_arithmetic", lambda gold: "nan"),
    ("decimal_arithmetic", lambda gold: gold[:-1] + str((int(gold[-1]) + 1) % 10)),
    ("fraction_simplification", lambda gold: f"{gold} extra"),
    ("gsm_symbolic", lambda gold: f"-{gold}"),
    ("gsm_symbolic", lambda gold: f"{gold} 7"),
    ("kakurasu", lambda gold: f"-{gold}"),
    ("knights_knaves", lambda gold: f"{gold} {gold}"),
    ("number_format", lambda gold: gold[:-1] + str((int(gold[-1]) + 1) % 10)),
    ("number_sorting", lambda gold: re.sub(r"\.[0-9]+", "", gold)),
    ("pool_matrix", lambda gold: re.sub(r"[0-9.]+$", lambda last: f"{float(last[0]) + 0.01:.2f}", gold)),
    ("quantum_lock", lambda gold: f"-{gold}"),
    ("sokoban", lambda gold: f"{gold} extra"),
    ("survo", lambda gold: f"{gold} extra"),
    ("time_intervals", lambda gold: f"{gold}, {gold}"),
    ("tower_of_hanoi", lambda gold: f"-{gold}"),
    ("word_sorting", lambda gold: f"{gold}, {gold.split(', ')[-1]}"),
]


@pytest.mark.parametrize(("name", "perturb"), CASES, ids=[name for name, _ in CASES])
def test_an_exploit_of_the_library_earns_nothing(name: str, perturb: Any) -> None:
    config = {"seed": 3, "size": 6}
    dataset = make_dataset(name, config)
    entries = [entry for entry in generate_entries(name, config, 6) if perturb(entry["answer"]) != entry["answer"]]
    assert entries
    given = [dataset.score_answer(perturb(entry["answer"]), entry) for entry in entries]
    assert max(given) >= 1, "the library has changed: it gives this nothing any more"
    assert max(scored(dataset, perturb(entry["answer"]), entry) for entry in entries) < 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("complex_arithmetic", lambda gold: gold.replace("i", "j")),
        ("complex_arithmetic", lambda gold: gold.replace(" ", "")),
        ("decimal_arithmetic", lambda gold: gold + "0"),
        ("fraction_simplification", lambda gold: gold.strip("$")),
        ("knights_knaves", lambda gold: gold.rstrip(".")),
        ("number_sorting", lambda gold: gold.replace(" ", "")),
        ("polynomial_equations", lambda gold: ", ".join(reversed(gold.split(", ")))),
        ("pool_matrix", lambda gold: f"{gold}\n"),
        ("word_sorting", lambda gold: gold.replace(", ", ",")),
    ],
)
def test_what_the_question_leaves_open_stays_open(name: str, change: Any) -> None:
    config = {"seed": 3, "size": 6}
    dataset = make_dataset(name, config)
    for entry in generate_entries(name, config, 6):
        assert scored(dataset, change(entry["answer"]), entry) == 1.0

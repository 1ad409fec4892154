"""Failures are recognised while a run trains: on curves made up for it, and in a run that collapses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from helpers.runs import curve, refusal
from ibro_lightning.callbacks.alarms import Alarms
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError

ENTROPY, LENGTH = "policy/entropy", "rollout/length"
Marks = dict[str, list[float]]


def heard(alarms: Alarms, curves: Iterable[Mapping[str, float]], first: int = 1) -> tuple[Marks, list[str]]:
    """The curves ``alarm/…`` without their prefix, and the lines."""
    marks: Marks = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration, metrics in enumerate(curves, start=first):
            for name, value in alarms.on_metrics(iteration, metrics).items():
                marks.setdefault(name.removeprefix("alarm/"), []).append(value)
    return marks, [str(warning.message) for warning in caught]


def entropies(*values: float) -> list[dict[str, float]]:
    return [{ENTROPY: value, LENGTH: 20.0, "rollout/reward": 0.0} for value in values]


def noisy(start: float, end: float, count: int) -> list[float]:
    """From one value to another, each iteration being off by up to a fifth."""
    return [(start + (end - start) * n / (count - 1)) * (1 + 0.2 * ((n * 7) % 5 - 2) / 2) for n in range(count)]


class TestSyntheticCurves:
    def test_a_healthy_run_raises_none(self) -> None:
        """The quick start: entropy falls to a quarter, lengths grow by a quarter, the reward rises."""
        values = zip(noisy(0.27, 0.065, 120), noisy(19.0, 24.0, 120), noisy(-0.55, 0.4, 120), strict=True)
        marks, lines = heard(Alarms(), [{ENTROPY: h, LENGTH: t, "rollout/reward": r} for h, t, r in values])
        assert marks.keys() == {"entropy_collapse", "entropy_explosion", "length_collapse"}
        assert not any(any(values) for values in marks.values())
        assert not lines

    def test_entropy_that_falls_to_nothing_is_a_collapse_said_once(self) -> None:
        marks, lines = heard(Alarms(), entropies(*noisy(0.3, 0.3, 5), *noisy(0.3, 0.0, 40), *[0.001] * 30))
        assert marks["entropy_collapse"][0] == 0.0
        assert marks["entropy_collapse"][-30:] == [1.0] * 30
        assert len(lines) == 1
        assert "entropy collapse: 0.0" in lines[0]
        assert "nats per token, 0.3 at the start (medians of 5): samples become alike" in lines[0]
        assert "\n" not in lines[0]

    def test_the_line_names_the_iteration_whose_median_is_below_the_threshold(self) -> None:
        """A tenth of the start is 0.02; the third of five values below it makes the median so."""
        marks, lines = heard(Alarms(), entropies(*[0.2] * 5, 0.019, 0.019, 0.019, 0.019))
        assert marks["entropy_collapse"] == [0.0, 0.0, 0.0, 1.0, 1.0]  # from iteration 5 on
        assert lines[0].startswith("iteration 8: entropy collapse: 0.019 nats per token, 0.2 at the start")

    def test_single_iterations_raise_nothing(self) -> None:
        spikes = [0.2, 0.2, 0.0, 0.2, 9.0] * 20
        marks, lines = heard(Alarms(), entropies(*spikes))
        assert not any(any(values) for values in marks.values())
        assert not lines

    def test_an_alarm_is_said_again_only_after_recovery(self) -> None:
        """Over at half of the way back, on a log scale: 0.02 · √10 = 0.063. Back to 0.05 is not over."""
        around = [*[0.2] * 5, *[0.01] * 5, *[0.05] * 5, *[0.01] * 5, *[0.07] * 5, *[0.01] * 5]
        marks, lines = heard(Alarms(), entropies(*around))
        assert "".join(str(int(value)) for value in marks["entropy_collapse"]) == "000" + "1" * 15 + "00000" + "111"
        assert [line.split(":")[0] for line in lines] == ["iteration 8", "iteration 28"]

    def test_a_high_start_is_not_held_against_a_run(self) -> None:
        """An untrained policy starts at 3 nats; 0.2, which many runs have, is no collapse."""
        marks, _ = heard(Alarms(), entropies(*[3.0] * 5, *[0.2] * 20))
        assert not any(marks["entropy_collapse"])
        marks, _ = heard(Alarms(), entropies(*[3.0] * 5, *[0.09] * 20))
        assert marks["entropy_collapse"][-1] == 1.0

    def test_entropy_that_multiplies_is_an_explosion(self) -> None:
        marks, lines = heard(Alarms(), entropies(*[0.3] * 5, *noisy(0.3, 3.0, 20), *[3.0] * 10, *[0.3] * 5))
        assert marks["entropy_explosion"][0] == 0.0
        assert marks["entropy_explosion"][-15] == 1.0
        assert marks["entropy_explosion"][-1] == 0.0, "it is over"
        assert len(lines) == 1
        assert "entropy explosion" in lines[0]
        assert "model.regularizer.coef" in lines[0]

    def test_within_the_papers_band_nothing_has_exploded(self) -> None:
        marks, _ = heard(Alarms(), entropies(*[0.05] * 5, *[0.45] * 20))
        assert not any(marks["entropy_explosion"])

    def test_responses_of_less_than_half_the_length_are_a_collapse(self) -> None:
        curves = [
            {LENGTH: length, "rollout/reward": reward}
            for length, reward in [*[(100.0, 0.1)] * 5, *[(45.0, -0.3)] * 10, *[(60.0, 0.0)] * 9, *[(80.0, 0.0)] * 5]
        ]
        marks, lines = heard(Alarms(), curves)
        assert marks.keys() == {"length_collapse"}, "no entropy was measured"
        assert marks["length_collapse"] == [0.0] * 3 + [1.0] * 19 + [0.0] * 3
        assert len(lines) == 1
        assert "length collapse: 45 tokens, 100 at the start (medians of 5), reward 0.1 -> -0.3" in lines[0]

    def test_a_band_is_watched_where_it_is_asked_for(self) -> None:
        run = entropies(*[0.4] * 5, *[0.2] * 5, *[0.31] * 5, *[0.35] * 5, *[0.6] * 5)
        assert "entropy_band" not in heard(Alarms(), run)[0]
        marks, lines = heard(Alarms(entropy_band=(0.3, 0.5)), run)
        assert "".join(str(int(value)) for value in marks["entropy_band"]) == "000" + "1" * 10 + "00000" + "111"
        assert len(lines) == 2
        assert "entropy out of [0.3, 0.5]: 0.2 nats per token" in lines[0]
        assert "entropy out of [0.3, 0.5]: 0.6 nats per token" in lines[1]

    def test_null_switches_an_alarm_off(self) -> None:
        off: dict[str, Any] = {"entropy_collapse": None, "entropy_explosion": None, "length_collapse": None}
        assert heard(Alarms(**off), entropies(*[1.0] * 5, *[0.0] * 9)) == ({}, [])

    def test_iterations_without_a_measurement_are_passed_over(self) -> None:
        """An iteration without an update has no entropy, and one that is nan is none."""
        gaps: list[Mapping[str, float]] = [{}, {ENTROPY: float("nan")}]
        run = [metrics for value in [*[0.2] * 5, *[0.01] * 5] for metrics in [*entropies(value), *gaps]]
        marks, lines = heard(Alarms(), run)
        assert len(lines) == 1
        assert lines[0].startswith("iteration 22")
        assert len(marks["entropy_collapse"]) == len(run) - 12

    def test_two_that_ask_of_one_iteration_are_told_the_same(self) -> None:
        alarms = Alarms(window=1)
        for metrics in entropies(0.5, 0.4):
            first = alarms.on_metrics(alarms.iteration + 1, metrics)
            assert alarms.on_metrics(alarms.iteration, metrics) == first
        assert len(alarms.latest[ENTROPY]) == 1


@pytest.mark.parametrize("cut", [2, 6, 9, 17])
def test_a_resumed_run_goes_on_where_the_state_was(cut: int) -> None:
    """Through JSON: a checkpoint holds plain values."""
    run = entropies(*[0.2] * 5, *[0.01] * 5, *[0.07] * 5, *[0.01] * 5)
    whole, lines = heard(Alarms(), run)
    one, other = Alarms(), Alarms()
    marks, said = heard(one, run[:cut])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    later, rest = heard(other, run[cut:], first=cut + 1)
    assert {name: marks.get(name, []) + values for name, values in later.items()} == whole
    assert said + rest == lines
    assert other.state_dict() != one.state_dict()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": 0}, "window: 0 - write 1 or more"),
    "share": ({"entropy_collapse": 1.5}, "write a share of the start between 0 and 1, or null"),
    "length": ({"length_collapse": 0}, "length_collapse: 0 - write a share"),
    "multiple": ({"entropy_explosion": 1.0}, "write a multiple above 1, or null"),
    "band": ({"entropy_band": (0.5, 0.3)}, "write [low, high] in nats"),
    "low": ({"entropy_band": (-1.0, 0.3)}, "write 0 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case: str) -> None:
    settings, line = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        Alarms(**settings)
    assert line in str(refused.value)


def test_without_metrics_it_says_that_it_does_nothing(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[Alarms()], max_epochs=0)
    with pytest.warns(UserWarning, match="Alarms does nothing: it needs the metrics of a MetricsLog"):
        trainer.fit(BoringModel())


def test_the_command_line_names_the_setting(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["fit", "--config", "tiny.yaml", "--alarms.entropy_band", "[0.5, 0.3]"], capsys)
    assert "alarms.entropy_band" in line


def test_a_run_that_collapses_says_so(workspace: Path) -> None:
    """A policy that is paid for one token, at a high learning rate and without a regulariser. The command line has the
    alarms by default; the curve is 0 before the line, and 1 from there on."""
    off = ["--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"]
    fast = ["--model.regularizer", "NoRegularizer", "--model.optimizer.lr", "0.05", "--trainer.max_epochs", "20"]
    all_groups = ["--data.dynamic_sampling", "null"]
    with pytest.warns(UserWarning, match="entropy collapse") as caught:
        main(["fit", "--config", "tiny.yaml", *off, *fast, *all_groups])
    lines = [str(warning.message) for warning in caught if "entropy collapse" in str(warning.message)]
    marks, measured = curve("alarm/entropy_collapse"), curve(ENTROPY)
    first = min(iteration for iteration, mark in marks.items() if mark)
    assert len(lines) == 1
    assert f"iteration {first}: entropy collapse" in lines[0]
    assert all(mark == float(iteration >= first) for iteration, mark in marks.items())
    assert sorted(measured[n] for n in range(first - 4, first + 1))[2] < 0.1

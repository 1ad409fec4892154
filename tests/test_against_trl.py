"""The parts of ``benchmarks/against_trl.py``, without TRL, which is not installed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import against_trl
from helpers import forked
from peers import environment, figures, problems, smollm2, tables, work

ROOT = Path(__file__).parents[1]


def iteration(cpu_s: float = 1.0, **others: Any) -> work.Iteration:
    """Two prompts with four responses each: 10 and 20 tokens, one in four and three in four right."""
    usual = {"prompts": ["a", "b"], "prompt_tokens": [3, 5], "completions": 8, "lengths": [10.0, 20.0]}
    usual |= {"accuracies": [0.25, 0.75], "optimizer_steps": 2, "wall_s": 2.0}
    return work.Iteration(**{"cpu_s": cpu_s, **usual, **others})


def report(side: str, *cpu_s: float, peak_mib: float = 100.0, **others: Any) -> work.Report:
    return work.Report(side, [iteration(one, **others) for one in cpu_s], peak_mib, 1, {"torch": "2"})


def test_the_first_iteration_warms_up_and_does_not_count() -> None:
    assert figures.median_cpu_s(report("ours", 100.0, 1.0, 2.0, 4.0)) == 2.0


def test_ratios_are_taken_within_a_turn_and_then_their_quartiles() -> None:
    spread = figures.ratios([1.0, 4.0, 9.0, 16.0, 25.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert figures.Spread.of([7.0]) == figures.Spread(7.0, 7.0, 7.0)
    assert spread.text(1) == "3.0 (2.0 - 4.0)"


def test_tokens_per_second_count_prompts_only_where_they_are_trained_on() -> None:
    phases = {"generate": 0.5, "update": 2.0}
    own = [report("ours", 9.0, 3.0, phases=phases)]
    assert figures.tokens_per_second(own, "generate") == 4 * (10 + 20) / 0.5
    assert figures.tokens_per_second(own, "update") == 4 * (10 + 20 + 3 + 5) / 2.0


def test_what_no_phase_covers_is_a_phase_of_its_own() -> None:
    assert iteration(3.0, phases={"generate": 0.5, "update": 2.0}).phases["other"] == 0.5
    assert not iteration(3.0).phases


def test_equal_work_passes() -> None:
    assert figures.differences([report("ours", 1, 2)], [report("trl", 3, 4)]) == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"prompts": ["a", "c"]}, "prompts"),
        ({"prompt_tokens": [3, 6]}, "prompt_tokens"),
        ({"completions": 6}, "completions"),
        ({"optimizer_steps": 1}, "optimizer_steps"),
    ],
)
def test_other_work_is_named(other: dict[str, Any], named: str) -> None:
    found = figures.differences([report("ours", 1, 2)], [report("trl", 1, 2, **other)])
    assert len(found) == 2
    assert all(named in text for text in found)


def test_a_missing_iteration_is_named() -> None:
    assert figures.differences([report("ours", 1, 2)], [report("trl", 1)]) == ["turn 1: 2 iterations and 1"]


def many(shift: float, name: str) -> list[work.Report]:
    """40 prompts whose lengths and accuracies vary by 1 around their own values, moved by ``shift``."""
    alternating = [10 + index % 7 + (1 if index % 2 else -1) * (0.5 if shift else -0.5) for index in range(40)]
    values = {"prompts": list(map(str, range(40))), "prompt_tokens": [4] * 40, "completions": 320}
    lengths = {"lengths": alternating, "accuracies": alternating}
    lengths[name] = [value + shift for value in alternating]
    return [report("either", 1, 2, **values, **lengths)]


@pytest.mark.parametrize("name", ["lengths", "accuracies"])
def test_what_is_sampled_from_the_same_weights_must_agree_within_its_standard_error(name: str) -> None:
    """The differences are ±1 in turn: a standard error of 0.16, so a mean of 0.3 may be chance, and 1 is not."""
    assert figures.differences(many(0.0, name), many(0.3, name)) == []
    (found,) = figures.differences(many(0.0, name), many(1.0, name))
    assert found.startswith(f"{name} of the first iteration")


def test_learning_means_that_accuracy_rises_by_more_than_chance() -> None:
    def run(accuracies: list[float]) -> work.Report:
        return replace(report("ours"), iterations=[iteration(accuracies=[one, one]) for one in accuracies])

    rising = [0.2, 0.22, 0.3, 0.4, 0.5, 0.6, 0.68, 0.7]
    assert figures.learned([run(rising)])
    assert not figures.learned([run(rising[::-1])])
    assert not figures.learned([run([0.2, 0.6, 0.4, 0.4, 0.4, 0.4, 0.3, 0.6])])  # a gain within its standard error
    reports = {"ours": [run(rising)], "trl": [run([0.2] * 8)]}
    assert "trl does not learn" in against_trl.verdicts(reports, learn=True)
    assert "trl: accuracy 0.200 -> 0.200" in tables.learning_table(reports)
    assert "trl does not learn" not in against_trl.verdicts(reports, learn=False)


def test_the_tables_show_every_side_and_every_ratio() -> None:
    phases = {"generate": 0.25, "update": 0.5}
    reports = {
        "ours": [report("ours", 9, 1.0, phases=phases)],
        "baseline": [report("baseline", 9, 2.0, phases={"generate": 0.5, "update": 1.0})],
        "trl": [report("trl", 9, 4.0, peak_mib=400.0)],
    }
    text = tables.side_table(reports)
    for line in (
        "ours / baseline: CPU 0.500 (0.500 - 0.500)",
        "ours / trl: CPU 0.250 (0.250 - 0.250)",
        "baseline / trl: CPU 0.500",
        "peak memory 0.250",
    ):
        assert line in text
    update = next(line for line in tables.phase_table(reports).splitlines() if line.startswith("update"))
    assert update.split()[1:3] == ["0.5000", "50.0%"]
    assert update.endswith("0.500 (0.500 - 0.500)")
    assert tables.summary(reports, [])["ratios"]["ours / trl"]["memory"]["median"] == 0.25


@pytest.mark.parametrize("task", against_trl.RECIPES)
def test_both_sides_read_one_recipe_without_what_a_peer_lacks(task: str) -> None:
    shipped = work.read_recipe(ROOT / "configs" / against_trl.RECIPES[task])
    recipe = work.comparable(shipped)
    data = recipe["data"]["init_args"]
    assert data["dynamic_sampling"] is None
    assert data["eval_sets"] is None
    assert data["engine"]["class_path"] == "HFEngine"
    assert recipe["trainer"]["precision"] == "32-true"
    assert data["reward"] == shipped["data"]["init_args"]["reward"]
    assert shipped["data"]["init_args"]["dynamic_sampling"] is not None, "a recipe without it needs no comparable()"
    assert [type(one).__name__ for one in work.built(data["reward"]).rewards][1] == "OverlongPenalty"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["sums", "--learn"], "random weights do not learn"),
        (["quickstart", "--no_trl"], "--baseline"),
        (["chess"], "invalid choice"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        against_trl.parse(arguments)
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize(("task", "option"), [("quickstart", "--policy"), ("sums", "--smollm2")])
def test_a_folder_without_a_model_is_refused(task: str, option: str, tmp_path: Path) -> None:
    options = against_trl.parse([task, option, str(tmp_path), "--no_trl", "--baseline", str(ROOT)])
    with pytest.raises(SystemExit, match=f"{option}: there is no model in"):
        against_trl.Bench(options, tmp_path / "bench")


def test_an_environment_that_is_ready_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    python = environment.environment(tmp_path)
    assert commands[1][-1:] == ["torch==2.13.0"]
    assert commands[2][-5:] == list(environment.PINS)
    commands.clear()
    assert environment.environment(tmp_path) == python == tmp_path / "bin" / "python"
    assert not commands
    monkeypatch.setattr(environment, "PINS", ("torch==2.14.0",))
    environment.environment(tmp_path)
    assert commands, "other pins are another environment"


def test_the_stand_in_for_smollm2_asks_as_many_tokens_and_is_sometimes_right(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from ibro_lightning.rewards import LastNumberReward
    from ibro_lightning.types import Completion, Prompt

    smollm2.write(tmp_path, vocab_size=256, hidden_size=18, num_hidden_layers=1, intermediate_size=8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is 3 + 4? Answer with the number only."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert len(ids) == 39
    assert tokenizer.unk_token_id not in ids
    answered = tokenizer.decode([100, 7 + 5 * 19], skip_special_tokens=True)
    completion = Completion((100, 102), (), "length", answered, 32, 0)
    (result,) = LastNumberReward()(Prompt("", "", tuple(ids), "7"), [completion])
    assert result.parts["accuracy"] == 1


@pytest.fixture
def sides(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., against_trl.Bench]:
    """Makes a bench of ours against ours on a recipe of a few responses. Only the job ``ours-0`` of a bench without
    further arguments starts a fresh process."""

    def bench(*arguments: str) -> against_trl.Bench:
        options = against_trl.parse(
            ["quickstart", "--no_trl", "--baseline", str(ROOT), "--policy", str(tiny_policy), *arguments]
        )
        made = against_trl.Bench(options, tmp_path / "bench")

        def run(command: Sequence[str], **settings: Any) -> Any:
            fresh = command[-1].endswith("ours-0.job.json") and not options.ours_args
            return (subprocess.run if fresh else forked.run)(command, **settings)

        monkeypatch.setattr(against_trl, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
        # Two threads that wait for each other in a loop take the CPU from each other on a busy machine.
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        recipe = work.read_recipe(made.recipes["ours"])
        data = recipe["data"]["init_args"]
        data["source"]["init_args"]["task"] = {"class_path": "NumberPath", "init_args": {"size": 12}}
        data |= {"prompts_per_rollout": 4, "group_size": 2}
        data["sampling"]["max_tokens"] = 17
        recipe["model"]["init_args"]["mini_batch_prompts"] = 2
        for file in made.recipes.values():
            file.write_text(yaml.safe_dump(recipe))
        made.settings = data
        return made

    return bench


@pytest.mark.slow
def test_two_source_trees_run_in_turns_on_the_same_problems(sides: Callable[..., against_trl.Bench]) -> None:
    bench = sides("--threads", "2")
    reports = against_trl.measure(bench, turns=1, iterations=3)
    assert list(reports) == ["ours", "baseline"]
    assert against_trl.verdicts(reports, learn=False) == []
    (ours,), (baseline,) = reports["ours"], reports["baseline"]
    drawn = problems.drawn(work.read_recipe(bench.recipes["ours"]), 0, 12)
    assert [name for one in ours.iterations for name in one.prompts] == [problem["id"] for problem in drawn]
    assert [one.lengths for one in ours.iterations] == [one.lengths for one in baseline.iterations]
    for one in ours.iterations:
        assert (one.completions, one.optimizer_steps) == (8, 2)
        assert {"generate", "reward", "update", "other"} <= one.phases.keys()
        assert sum(one.phases.values()) == pytest.approx(one.cpu_s)
        assert min(one.phases.values()) >= 0, "a phase has wall time"
    assert ours.peak_mib > 100
    assert ours.threads == 2


BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"


def test_cpu_seconds_are_those_of_all_processes_of_a_side() -> None:
    before = work.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert work.cpu_seconds() - before > 0.25, "a child that runs"
        child.communicate(b"\n")
    assert work.cpu_seconds() - before > 0.25, "a child that has ended"


def test_peak_memory_is_that_of_all_processes_of_a_side() -> None:
    before = work.peak_mib()
    hold = "block = bytearray(200 << 20)\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert work.peak_mib() - before > 195
        child.communicate(b"\n")


def test_phases_of_our_side_are_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from ibro_lightning import timing
    from peers.ours import CpuClock

    monkeypatch.setattr(timing, "time", CpuClock())
    timer = timing.PhaseTimer()
    with timer("generate"):
        CpuClock().sleep(0.5)
    assert timer.seconds["generate"] < 0.25, "waiting costs no CPU time"


def test_trl_gets_its_fastest_micro_batch(
    sides: Callable[..., against_trl.Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = sides(), list[int]()

    def run(side: str, turn: int, iterations: int, micro_batch: int) -> work.Report:
        asked.append(micro_batch)
        return report(side, 9.0, *[{8: 3.0, 4: 2.0, 2: 4.0}[micro_batch]] * (iterations - 1))

    monkeypatch.setattr(bench, "run", run)
    assert bench.fastest([8, 4, 2]) == 4
    assert asked == [8, 4, 2, 8, 4, 2]
    assert bench.fastest([2]) == 2


def test_sides_take_turns_in_changing_order(
    sides: Callable[..., against_trl.Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, order = sides(), list[tuple[int, str]]()

    def run(side: str, turn: int, iterations: int, micro_batch: int | None) -> work.Report:
        order.append((turn, side))
        return report(side, *[1.0] * iterations)

    monkeypatch.setattr(bench, "run", run)
    reports = against_trl.measure(bench, turns=2, iterations=3)
    assert order == [(0, "ours"), (0, "baseline"), (1, "baseline"), (1, "ours")]
    assert [len(one.iterations) for one in reports["ours"]] == [3, 3]


def test_a_side_that_fails_is_shown_with_the_end_of_its_log(sides: Callable[..., against_trl.Bench]) -> None:
    bench = sides("--ours_args=--model.learning_rate=fast")
    with pytest.raises(SystemExit, match=r"ours ended with [1-9](.|\n)*learning_rate"):
        bench.run("ours", 0, 1)

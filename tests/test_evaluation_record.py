"""An evaluation on disk: what is written, what is read back, and how one that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from helpers.processes import command as command_line
from helpers.processes import logs, run_ranks, start_ranks
from ibro_lightning import __version__
from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.evaluation_report import evaluation_table
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules import evaluation as evaluation_module
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.evaluation.metrics import Estimate, Evaluation
from ibro_lightning.evaluation.record import EvaluationRecord, describe, fingerprint
from ibro_lightning.rewards import LastNumberReward, RewardByPart, RewardSum, VerifiableReward
from ibro_lightning.runs.parquet import read_groups, write_parquet
from ibro_lightning.runs.samples_manifest import MANIFEST
from ibro_lightning.tasks import CountdownReward
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

torch.set_num_threads(1)


# Files: everything comes back as it was, or nothing does.


def completion(seed: int, *, tokens: int = 3, text: str = "x", reason: str = "stop") -> Completion:
    logp = [struct.unpack("f", struct.pack("f", -0.1 * (seed + i)))[0] for i in range(tokens)]  # as engines give it
    return Completion(tuple(range(tokens)), tuple(logp), reason, text, 7, seed)  # type: ignore[arg-type]


def groups() -> list[Group]:
    """Two prompts with three responses each, of two parts of a mixture, and with all that can be missing."""
    first = Prompt("a/0", "1>2:", (1, 2, 3), 2, {"level": 4}, part="a")
    second = Prompt("b/0", "what?", (4,), {"numbers": [1, 2]}, {}, part="b")
    return [
        Group(
            first,
            (
                completion(11, text="two \u2192 2\n\\boxed{2}\x00\ufffd"),
                completion(2**63 - 1, tokens=0, text="", reason="deadline"),
                completion(13, tokens=7, reason="length"),
            ),
            (
                RewardResult(1.0, {"accuracy": 1.0, "overlong": -0.25}, "2"),
                RewardResult(-1.0, {"accuracy": 0.0, "overlong": 0.0}, "", timed_out=True),
                RewardResult(1 / 3, {"accuracy": 0.1, "overlong": 1e-300}, None),
            ),
        ),
        Group(
            second,
            tuple(completion(seed) for seed in (5, 6, 7)),
            tuple(RewardResult(float(right), {"accuracy": float(right)}, None) for right in (0, 1, 0)),
        ),
    ]


def rollout(of: Sequence[Group]) -> Rollout:
    return Rollout.from_groups(of, name="mixed", iteration=0, temperature=1.0)


def asked(of: Sequence[Group]) -> tuple[list[Prompt], list[list[int]]]:
    return [group.prompt for group in of], [[sample.seed for sample in group.completions] for group in of]


def test_responses_come_back_exactly_as_they_were(tmp_path: Path) -> None:
    """A part that only one of two rewards has stays away from the other's results, as it was."""
    path = write_parquet(tmp_path / "mixed" / "batch_0000.parquet", rollout(groups()), tokens=True)
    again = read_groups(path, *asked(groups()))
    assert again == groups()
    assert again is not None
    assert rollout(again).rewards.tolist() == rollout(groups()).rewards.tolist()
    assert [path.name for path in (tmp_path / "mixed").iterdir()] == ["batch_0000.parquet"]


def test_responses_to_other_prompts_or_seeds_are_not_taken(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "batch.parquet", rollout(groups()), tokens=True)
    prompts, seeds = asked(groups())
    assert read_groups(path, prompts[::-1], seeds[::-1]) is None
    assert read_groups(path, [replace(prompts[0], id="c"), prompts[1]], seeds) is None
    assert read_groups(path, prompts, [seeds[0], [5, 6, 8]]) is None
    assert read_groups(path, prompts, [seeds[0], [5, 6]]) is None
    assert read_groups(path, prompts[:1], seeds[:1]) is None
    assert read_groups(path, [*prompts, prompts[0]], [*seeds, [1]]) is None


def test_files_that_are_no_record_of_responses_are_not_taken(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", rollout(groups()), tokens=True)
    content = whole.read_bytes()
    assert read_groups(tmp_path / "none.parquet", *asked(groups())) is None
    for length in (0, 1, 4, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.parquet").write_bytes(content[:length])
        assert read_groups(tmp_path / "cut.parquet", *asked(groups())) is None, length
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "other.parquet")
    assert read_groups(tmp_path / "other.parquet", *asked(groups())) is None
    bare = write_parquet(tmp_path / "bare.parquet", rollout(groups()))  # as rollouts are written: without tokens
    assert read_groups(bare, *asked(groups())) is None


def continued(folder: Path) -> EvaluationRecord:
    return EvaluationRecord(folder, {"weights": "w"})


def test_a_file_that_has_changed_since_it_was_written_is_not_taken(tmp_path: Path) -> None:
    """Parquet itself finds few of these: a bit of a log-prob or of a length is another number."""
    folder = tmp_path / "validate"
    continued(folder).write("mixed", 0, rollout(groups()))
    path = folder / "mixed" / "batch_0000.parquet"
    content = path.read_bytes()
    record = continued(folder)
    assert record.read("mixed", 0, *asked(groups())) == groups()
    assert record.read("mixed", 1, *asked(groups())) is None
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        assert record.read("mixed", 0, *asked(groups())) is None, place
    path.write_bytes(content)
    assert record.read("mixed", 0, *asked(groups())) == groups()


def test_a_file_that_the_manifest_does_not_know_is_not_taken(tmp_path: Path) -> None:
    """A kill between a file and the manifest costs one batch."""
    folder = tmp_path / "validate"
    continued(folder).write("mixed", 0, rollout(groups()))
    shutil.copy(folder / "mixed" / "batch_0000.parquet", folder / "mixed" / "batch_0001.parquet")
    assert continued(folder).read("mixed", 1, *asked(groups())) is None


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", '"text"', json.dumps({"version": __version__, "fingerprint": {"weights": "w"}, "complete": False})],
)
def test_a_broken_manifest_begins_anew(manifest: str, tmp_path: Path) -> None:
    folder = tmp_path / "validate"
    continued(folder).write("mixed", 0, rollout(groups()))
    (folder / "_manifest.json").write_text(manifest)
    assert not continued(folder).continues
    assert (tmp_path / "validate.1" / "mixed" / "batch_0000.parquet").exists()


def test_an_evaluation_by_another_version_of_ours_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version stands for the source of our own verifiers."""
    continued(tmp_path / "validate")
    assert continued(tmp_path / "validate").continues
    monkeypatch.setattr("ibro_lightning.evaluation.record.__version__", "0.0.1")
    assert not continued(tmp_path / "validate").continues


def test_nothing_that_was_moved_aside_is_overwritten(tmp_path: Path) -> None:
    """Also if only one half of an earlier evaluation is still there: its samples, or its results."""
    folder = tmp_path / "validate"
    for number in range(1, 4):
        EvaluationRecord(folder, {"weights": str(number)})
        (tmp_path / "validate.json").write_text(str(number))
        if number == 1:
            shutil.rmtree(folder)
    EvaluationRecord(folder, {"weights": "4"})
    assert [(tmp_path / f"validate.{n}.json").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    assert [(tmp_path / f"validate.{n}").exists() for n in (1, 2, 3)] == [False, True, True]


# What must be the same for an evaluation to go on.


class Mode(Enum):
    STRICT = 1
    LENIENT = 2


class Wrapped(VerifiableReward):
    """A user's reward that is made of another one, and of settings of any type."""

    def __init__(self, inner: Any = None, **settings: Any) -> None:
        super().__init__()
        self.inner = inner
        self.settings = settings
        self._cache = object()

    def verify(self, prompt: Prompt, completion: Completion) -> bool:
        return True


def one(x: int) -> int:
    return x


def two(x: int) -> int:
    return x + 1


DIFFERENT = [
    (LastNumberReward(), LastNumberReward(correct=2.0)),
    (LastNumberReward(), CountdownReward()),
    (CountdownReward(), CountdownReward(use_all=False)),
    (RewardSum([LastNumberReward()]), RewardSum([LastNumberReward()], [2.0])),
    (RewardSum([LastNumberReward()]), RewardSum([LastNumberReward(correct=2.0)])),
    (RewardByPart({"a": LastNumberReward()}), RewardByPart({"b": LastNumberReward()})),
    (Wrapped(LastNumberReward()), Wrapped(LastNumberReward(correct=2.0))),
    (Wrapped(one), Wrapped(two)),
    (Wrapped("x".upper), Wrapped("x".lower)),
    (Wrapped(LastNumberReward), Wrapped(CountdownReward)),
    (Wrapped(mode=Mode.STRICT), Wrapped(mode=Mode.LENIENT)),
    (Wrapped(path=Path("a")), Wrapped(path=Path("b"))),
    (Wrapped(number=1), Wrapped(number="1")),
    (Wrapped(number=1), Wrapped(number=True)),
    (Wrapped(words={"a", "b"}), Wrapped(words={"a", "c"})),
    (Wrapped(raw=b"a"), Wrapped(raw=b"b")),
    (Wrapped(table=torch.ones(2)), Wrapped(table=torch.zeros(2))),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_settings_that_differ_have_different_fingerprints(first: Any, second: Any) -> None:
    assert fingerprint([], {"reward": first}) != fingerprint([], {"reward": second})
    for reward in (first, second):
        assert fingerprint([], {"reward": reward}) == fingerprint([], {"reward": reward})


def test_the_same_settings_have_the_same_fingerprint() -> None:
    """Whatever object they are, and whatever it has cached in between."""
    assert describe(Wrapped(LastNumberReward(), words={"b", "a"})) == describe(
        Wrapped(LastNumberReward(), words={"a", "b"})
    )


def test_the_fingerprint_tells_every_bit_of_the_weights() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}

    def of(**changed: torch.Tensor) -> str:
        return fingerprint({**weights, **changed}.items(), {})["weights"]

    assert of() == of(a=weights["a"].clone())
    assert of() == of(a=weights["a"].t().contiguous().t()), "the same numbers, laid out otherwise"
    others = [
        of(a=weights["a"].reshape(3, 2)),
        of(a=weights["a"].nextafter(torch.tensor(9.0))),
        of(b=torch.ones(2, dtype=torch.float16)),
        of(c=torch.ones(1)),
    ]
    assert len({of(), *others}) == 5


# Whole evaluations through the command line.

GRADERS = '''
"""A verifier that can be told to fail, or to wait to be killed, when it is called for the n-th time."""

import os
import time
from pathlib import Path

from ibro_lightning.sources import PromptSource
from ibro_lightning.rewards import Verdict, VerifiableReward
from ibro_lightning.types import Problem

calls = 0


class Starts(PromptSource):
    def problems(self):
        for n in range(10):
            yield Problem(id=str(n), prompt=f"{n}>{n + 1}:", answer=n + 1)


def stop():
    global calls
    calls += 1
    if calls == int(os.environ.get("RAISE_AT", 0)):
        raise KeyError("as told")
    if calls == int(os.environ.get("WAIT_AT", 0)):
        Path("waiting").touch()
        time.sleep(600)


def right(text):
    return text.count("=") % 2 == 1


class Reads(VerifiableReward):
    def verify(self, prompt, completion):
        if completion.text:  # not the empty response that is tried before anything starts
            stop()
        return Verdict(right(completion.text), completion.text[-1:] if ">" in completion.text else "")
'''

RECIPE = """
seed_everything: 3
num_threads: 1
trainer: {accelerator: cpu, default_root_dir: run}
model: {class_path: PolicyModule, init_args: {policy: POLICY}}
data:
  class_path: EvaluationDataModule
  init_args:
    eval_batch_prompts: 3
    reward_pool: null
    weight_check: null
    eval_sets:
      starts:
        source: {class_path: graders.Starts}
        reward: {class_path: graders.Reads}
        samples: 3
        sampling: {max_tokens: 6}
      few:
        source: {class_path: graders.Starts}
        reward: {class_path: graders.Reads}
        samples: 2
        limit: 5
        sampling: {max_tokens: 9, temperature: 0.8, top_p: 0.9}
"""
BATCHES = 4 + 2
"""Of ten and of five prompts, three at a time."""
RESPONSES = {"starts": 10 * 3, "few": 5 * 2}


def equip(folder: Path, policy: Path) -> None:
    (folder / "graders.py").write_text(GRADERS)
    (folder / "eval.yaml").write_text(RECIPE.replace("POLICY", str(policy)))
    sys.modules.pop("graders", None)  # that of another test


@pytest.fixture
def lab(workspace: Path, tiny_policy: Path) -> Iterator[Path]:
    """The workspace with ``eval.yaml``: two sets, six batches, 40 responses."""
    equip(workspace, tiny_policy)
    yield workspace
    sys.modules.pop("graders", None)


@pytest.fixture(scope="module")
def failed(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``evaluations`` of a run that failed in its second batch; they go on in any run's folder."""
    folder = tmp_path_factory.mktemp("failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        equip(folder, tiny_policy)
        fail(patch)
    return folder / "run" / "evaluations"


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many responses each batch has that is generated from now on."""
    counts: list[int] = []
    collect = Collector.collect

    def counted(self: Collector, prompts: Any, seeds: Any, *others: Any) -> list[Group]:
        groups = collect(self, prompts, seeds, *others)
        counts.append(sum(map(len, seeds)))
        return groups

    monkeypatch.setattr(Collector, "collect", counted)
    return counts


def validate(*arguments: str, command: str = "validate") -> None:
    main([command, "--config", "eval.yaml", *arguments])


def fail(monkeypatch: pytest.MonkeyPatch, call: int = 15) -> None:
    """An evaluation whose verifier raises when it is called for the n-th time, by default in the second batch."""
    sys.modules.pop("graders", None)
    monkeypatch.setenv("RAISE_AT", str(call))
    with pytest.raises(SystemExit):
        validate()
    monkeypatch.delenv("RAISE_AT")
    sys.modules.pop("graders", None)


def results(run: Path) -> Any:
    return json.loads((run / "evaluations" / "validate.json").read_text())


def samples(run: Path, name: str) -> pandas.DataFrame:
    return pandas.read_parquet(run / "evaluations" / "validate" / name)


def assert_same_evaluations(first: Path, second: Path) -> None:
    assert results(first) == results(second)
    for name, count in RESPONSES.items():
        assert len(samples(first, name)) == count
        pandas.testing.assert_frame_equal(samples(first, name), samples(second, name), check_exact=True)
    assert not list(first.rglob("*.partial"))


def done(run: Path) -> dict[str, int]:
    """When each batch was written."""
    return {path.name: path.stat().st_mtime_ns for path in run.rglob("starts/*.parquet")} | {
        f"few/{path.name}": path.stat().st_mtime_ns for path in run.rglob("few/*.parquet")
    }


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (20, 2), (33, 4)], ids=["at once", "in a set", "in the second set"])
def test_an_evaluation_that_failed_goes_on_where_it_was(
    call: int, kept: int, lab: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    validate("--trainer.default_root_dir", "whole")
    assert generated == [9, 9, 9, 3, 6, 4]
    fail(monkeypatch, call)
    assert not (lab / "run" / "evaluations" / "validate.json").exists()
    before = done(lab / "run")
    assert len(before) == kept
    generated.clear()
    validate()
    assert generated == [9, 9, 9, 3, 6, 4][kept:]
    assert done(lab / "run").items() >= before.items(), "a batch was written again"
    assert_same_evaluations(lab / "run", lab / "whole")
    assert [path.name for path in (lab / "run" / "evaluations").iterdir() if ".1" in path.name] == []


def validate_and_wait(at: str) -> None:
    os.environ["WAIT_AT"] = at
    command_line(["validate", "--config", "eval.yaml"])


def test_an_evaluation_that_was_killed_goes_on_where_it_was(lab: Path, generated: list[int]) -> None:
    """SIGKILL, while the third batch is being judged."""
    (process,) = start_ranks(1, validate_and_wait, "22", folder=lab)
    patience = time.monotonic() + 600
    while not (lab / "waiting").exists():
        assert process.exitcode is None, "it ended before it could be killed"
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = done(lab / "run")
    assert sorted(before) == ["batch_0000.parquet", "batch_0001.parquet"]
    validate()
    assert generated == [9, 3, 6, 4]
    assert done(lab / "run").items() >= before.items()
    validate("--trainer.default_root_dir", "whole")
    assert_same_evaluations(lab / "run", lab / "whole")


def test_an_evaluation_that_failed_twice_goes_on_where_it_was(
    lab: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, 12)
    fail(monkeypatch, 12)
    assert len(done(lab / "run")) == 2
    generated.clear()
    validate()
    assert len(generated) == BATCHES - 2


def test_a_damaged_batch_is_generated_again(lab: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    validate("--trainer.default_root_dir", "whole")
    fail(monkeypatch, 33)
    folder = lab / "run" / "evaluations" / "validate" / "starts"
    content = (folder / "batch_0001.parquet").read_bytes()
    (folder / "batch_0001.parquet").write_bytes(content[: len(content) // 2])
    (folder / "batch_0003.parquet.partial").write_bytes(content)  # of a kill while a file was written
    (folder / "batch_0003.parquet").unlink()
    generated.clear()
    validate()
    assert generated == [9, 3, 6, 4]
    assert_same_evaluations(lab / "run", lab / "whole")


def another_policy(lab: Path, policy: Path) -> list[str]:
    shutil.copytree(policy, lab / "other")
    weights = load_file(lab / "other" / "model.safetensors")
    name = min(weights)
    weights[name].view(-1)[0] += 0.001
    save_file(weights, lab / "other" / "model.safetensors", metadata={"format": "pt"})
    return ["--model.policy", "other"]


def another_configuration(lab: Path, policy: Path) -> list[str]:
    """The same weights, used otherwise."""
    shutil.copytree(policy, lab / "other")
    config = json.loads((lab / "other" / "config.json").read_text())
    config["rms_norm_eps"] = 0.01
    (lab / "other" / "config.json").write_text(json.dumps(config))
    return ["--model.policy", "other"]


def mended(old: str, new: str) -> Callable[[Path, Path], list[str]]:
    def mend(lab: Path, policy: Path) -> list[str]:
        assert old in GRADERS
        (lab / "graders.py").write_text(GRADERS.replace(old, new))
        return []

    return mend


def option(*arguments: str) -> Callable[[Path, Path], list[str]]:
    return lambda lab, policy: list(arguments)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(another_policy, id="weights"),
        pytest.param(another_configuration, id="configuration"),
        pytest.param(option("--seed_everything", "4"), id="seed"),
        pytest.param(option("--data.eval_samples", "4"), id="k"),
        pytest.param(option("--data.eval_sets.few.sampling.temperature", "0.7"), id="temperature"),
        pytest.param(option("--data.eval_sets.few.reward.init_args.correct", "2"), id="reward"),
        pytest.param(option("--data.eval_sets.few.limit", "4"), id="prompts"),
        pytest.param(option("--data.eval_batch_prompts", "2"), id="batches"),
        pytest.param(option("--data.engine", "HFEngine", "--data.engine.dtype", "bfloat16"), id="engine"),
        pytest.param(option("--data.reward_pool.timeout_score", "0.5"), id="pool"),
        pytest.param(mended("completion.text[-1:]", "completion.text[-2:]"), id="verifier"),
        pytest.param(mended("% 2 == 1", "% 2 == 0"), id="what the verifier calls"),
    ],
)
def test_another_evaluation_is_not_continued_but_kept(
    change: Callable[[Path, Path], list[str]],
    lab: Path,
    tiny_policy: Path,
    generated: list[int],
    failed: Path,
) -> None:
    evaluations = shutil.copytree(failed, lab / "run" / "evaluations")
    (evaluations / "validate.json").write_text("{}")  # results of an evaluation before that
    kept = {path.relative_to(evaluations / "validate"): path.read_bytes() for path in evaluations.rglob("*.parquet")}
    validate(*change(lab, tiny_policy))
    assert len(generated) >= BATCHES
    aside = evaluations / "validate.1"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*.parquet")} == kept
    assert len(kept) == 1
    assert (evaluations / "validate.1.json").read_text() == "{}"
    assert results(lab / "run").keys() == {"starts", "few"}


def test_the_same_policy_in_another_folder_is_the_same_policy(
    lab: Path, tiny_policy: Path, generated: list[int], failed: Path
) -> None:
    shutil.copytree(failed, lab / "run" / "evaluations")
    shutil.copytree(tiny_policy, lab / "copy")
    validate("--model.policy", "copy")
    assert len(generated) == BATCHES - 1


def test_a_finished_evaluation_is_not_reused(lab: Path, generated: list[int]) -> None:
    validate()
    first = (lab / "run" / "evaluations" / "validate.json").read_bytes()
    generated.clear()
    validate()
    evaluations = lab / "run" / "evaluations"
    assert len(generated) == BATCHES
    assert (evaluations / "validate.1.json").read_bytes() == first == (evaluations / "validate.json").read_bytes()
    assert len(pandas.read_parquet(evaluations / "validate.1" / "starts")) == RESPONSES["starts"]


# What an evaluation leaves.


def test_the_samples_of_a_set_are_one_table(lab: Path) -> None:
    validate()
    table = samples(lab / "run", "starts")
    assert len(table) == RESPONSES["starts"]
    assert (table.groupby("prompt_id").size() == 3).all()
    expected = {"prompt", "answer", "response", "finish_reason", "seed", "reward", "reward_accuracy", "answer_read"}
    assert expected | {"timed_out", "token_ids", "logp", "response_tokens"} <= set(table.columns)
    assert [len(tokens) for tokens in table.token_ids] == table.response_tokens.tolist()
    assert table.reward_accuracy.mean() == pytest.approx(results(lab / "run")["starts"]["avg_at_k"]["mean"])
    assert (table.answer_read != "").mean() == pytest.approx(results(lab / "run")["starts"]["extracted"])
    whole = pandas.read_parquet(lab / "run" / "evaluations" / "validate")
    assert len(whole) == sum(RESPONSES.values()), "the manifest is no part of the table"


def test_the_command_prints_all_sets_and_says_where_their_samples_are(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validate()
    output = capsys.readouterr().out
    header, line, *rows = output[output.index("set ") :].splitlines()
    assert header.split() == ["set", "questions", "avg@k", "pass@k", "maj@k", "k", "length", "cut", "read"]
    assert set(line) == {"-", " "}
    assert [row.split()[:2] for row in rows[:2]] == [["starts", "10"], ["few", "5"]]
    assert "run/evaluations/validate.json" in output
    content = results(lab / "run")["few"]
    assert set(content["pass_at_k"]) == {"1", "2"}
    assert 0 < content["extracted"] < 1
    assert content["maj_at_k"]["low"] <= content["maj_at_k"]["mean"] <= content["maj_at_k"]["high"]


def test_the_settings_of_an_evaluation_are_kept_beside_it(lab: Path) -> None:
    validate()
    assert (lab / "run" / "validate.yaml").read_text().count("eval_batch_prompts: 3") == 1


def test_test_writes_its_own_results(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate(command="test")
    evaluations = lab / "run" / "evaluations"
    assert sorted(path.name for path in evaluations.iterdir()) == ["test", "test.json"]
    assert len(pandas.read_parquet(evaluations / "test" / "few")) == RESPONSES["few"]
    assert "test\nset " in capsys.readouterr().out
    validate()
    assert results(lab / "run") == json.loads((evaluations / "test.json").read_text())


def test_predict_leaves_no_evaluation(lab: Path) -> None:
    validate(command="predict")
    assert not (lab / "run" / "evaluations").exists()
    assert len(pandas.read_parquet(lab / "run" / "predictions" / "starts")) == RESPONSES["starts"]


def test_evaluations_within_training_leave_samples_and_curves_and_hash_no_weights(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("weights were hashed")

    monkeypatch.setattr(evaluation_module, "fingerprint", refuse)
    reward = ["--data.eval_sets.starts.reward", "graders.Reads"]
    main(["fit", "--config", "tiny.yaml", "--data.eval_batch_prompts", "4", *reward])
    evaluations = lab / "run" / "evaluations"
    names = ["iteration_000000", "iteration_000002"]
    assert sorted(path.name for path in evaluations.iterdir()) == sorted([*names, *(f"{name}.json" for name in names)])
    for name in names:
        table = pandas.read_parquet(evaluations / name / "starts")
        assert len(table) == 10 * 4
        content = json.loads((evaluations / f"{name}.json").read_text())["starts"]
        assert table.reward_accuracy.mean() == pytest.approx(content["avg_at_k"]["mean"])
    events = EventAccumulator(str(lab / "run"))
    events.Reload()
    drawn = {tag.removeprefix("val/starts/") for tag in events.Tags()["scalars"] if tag.startswith("val/starts/")}
    assert {tag for tag in drawn if "/" not in tag} == {
        "accuracy",
        "avg@4",
        "coverage",
        "pass@2",
        "pass@4",
        "majority",
        "maj@4",
        "length",
        "truncated",
        "extracted",
        "timed_out",
    }
    assert [event.step for event in events.Scalars("val/starts/maj@4")] == [0, 2]
    (last,) = [event.value for event in events.Scalars("val/starts/extracted") if event.step == 2]
    assert last == pytest.approx(content["extracted"])


@pytest.mark.parametrize(
    ("option", "value"), [("eval_samples", "0"), ("eval_samples", "-1"), ("eval_max_tokens", "0")], ids=str
)
def test_impossible_numbers_for_all_sets_name_the_setting(
    option: str, value: str, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        validate(f"--data.{option}", value)
    errors = capsys.readouterr().err
    assert f"data.{option}: {value} - write 1 or more" in errors
    assert "Traceback" not in errors


def test_a_quick_look_overrides_every_set(lab: Path) -> None:
    validate("--data.eval_samples", "1", "--data.eval_max_tokens", "2")
    for name, content in results(lab / "run").items():
        assert content["samples"] == 1
        table = samples(lab / "run", name)
        assert set(table.max_tokens) == {2}
        assert table.response_tokens.max() <= 2


def test_two_ranks_share_an_evaluation_that_one_process_goes_on_with(
    lab: Path, monkeypatch: pytest.MonkeyPatch, generated: list[int]
) -> None:
    """The same results and samples as one process, and one record, whoever has generated what is in it."""
    validate()
    whole = len(generated)
    (lab / "run").rename(lab / "one")
    two = ["validate", "--config", "eval.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    codes = run_ranks(2, command_line, two, folder=lab)
    assert codes == [0, 0], logs(lab)
    assert results(lab / "one") == results(lab / "run")
    for name in RESPONSES:  # in other batches, the engine's log-probs are rounded otherwise
        ours, theirs = (samples(lab / run, name).drop(columns=["logp", "mean_logp"]) for run in ("one", "run"))
        pandas.testing.assert_frame_equal(ours, theirs, check_exact=True)
    manifest = json.loads((lab / "run" / "evaluations" / "validate" / MANIFEST).read_text())
    last = sorted(manifest["files"])[-1]
    del manifest["files"][last]
    (lab / "run" / "evaluations" / "validate" / MANIFEST).write_text(json.dumps({**manifest, "complete": False}))
    generated.clear()
    validate()
    assert len(generated) == 1 < whole
    assert results(lab / "one") == results(lab / "run")


# The recipe for any Hugging Face folder.

WORDS = ["<unk>", "</s>", "user", "assistant", "|", "Answer:", "34", "$34$", "\\boxed{204}", "\\boxed{468}", "70", "so"]
TABLES = {
    "AMC23": [
        {"id": 0, "question": "What is 17 + 17?", "answer": "34.0"},
        {"question": "What is 35 + 35?", "answer": "70.0"},
    ],
    "AIME24": [{"problem": "What is 200 + 4?", "solution": "It is $200 + 4 = \\boxed{204}$."}],
    "AIME25": [{"problem": f"What is {n} + 0?", "answer": str(n)} for n in (70, 468, 588)],
}
"""Of the published shapes: columns differ from set to set."""


@pytest.fixture
def chat_policy(tmp_path: Path) -> Path:
    """A random model whose every word is part of an answer, with a chat template."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} | {% endfor %}assistant"
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_any_folder_is_evaluated_on_the_three_sets(
    chat_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``eval_math.yaml`` as its header says, on stand-ins for the published files, its verifiers in other processes."""
    for name, rows in TABLES.items():
        path = tmp_path / f"{name.lower()}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setenv(f"IBRO_{name}", str(path))
    monkeypatch.chdir(tmp_path)
    short = ["--data.eval_samples", "12", "--data.eval_max_tokens", "4", "--data.reward_pool.workers", "1"]
    main(["validate", "--config", "eval_math.yaml", "--model.policy", str(chat_policy), *short])
    run = tmp_path / "runs" / "eval_math"
    content = results(run)
    assert {name: one["questions"] for name, one in content.items()} == {"amc23": 2, "aime24": 1, "aime25": 3}
    for name, one in content.items():
        table = samples(run, name)
        assert len(table) == 12 * one["questions"]
        assert one["timed_out"] == 0
        assert one["extracted"] == pytest.approx((table.answer_read != "").mean())
        assert one["maj_at_k"] is not None
        assert table.reward_accuracy.mean() == pytest.approx(one["avg_at_k"]["mean"])
    table = pandas.concat([samples(run, name) for name in content])
    golds = table.answer.map(json.loads)
    assert set(golds) == {"34", "70", "204", "468", "588"}, "34.0 is 34, and 204 is in the box of a solution"
    right = [(text, gold) for text, gold, one in zip(table.response, golds, table.reward_accuracy, strict=True) if one]
    assert right
    assert all(gold in text for text, gold in right)
    assert table.prompt.str.match(r"(?s)user .* \| assistant$").all(), "through the chat template"
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "%" in line] == list(content)


# The table that people read.


def evaluation(**changes: Any) -> Evaluation:
    sure = Estimate(0.5, 0.25, 0.75)
    return replace(
        Evaluation(40, 2, sure, {1: sure, 2: Estimate(0.6, 0.3, 0.9)}, sure, 12.34, 0.1, 0.875, 0), **changes
    )


def test_the_table_shows_all_that_was_measured() -> None:
    table = evaluation_table(
        {"amc23": evaluation(), "silent": evaluation(maj_at_k=None, extracted=None), "slow": evaluation(timed_out=3)}
    )
    assert table == textwrap.dedent("""\
        set     questions  avg@k                pass@k               maj@k                k  length  cut     read
        ------  ---------  -------------------  -------------------  -------------------  -  ------  ------  ------
        amc23   40         50.0 % [25.0, 75.0]  60.0 % [30.0, 90.0]  50.0 % [25.0, 75.0]  2  12.3    10.0 %  87.5 %
        silent  40         50.0 % [25.0, 75.0]  60.0 % [30.0, 90.0]  -                    2  12.3    10.0 %  -
        slow    40         50.0 % [25.0, 75.0]  60.0 % [30.0, 90.0]  50.0 % [25.0, 75.0]  2  12.3    10.0 %  87.5 %
        3 verifications were stopped (data.reward_pool) and count with its timeout_score""")


def test_the_table_has_no_columns_that_no_verifier_fills() -> None:
    header, _, row = evaluation_table({"silent": evaluation(maj_at_k=None, extracted=None)}).splitlines()
    assert header.split() == ["set", "questions", "avg@k", "pass@k", "k", "length", "cut"]
    assert row.split()[:2] == ["silent", "40"]


def test_validate_and_test_leave_curves_for_tensorboard(lab: Path) -> None:
    """In a folder of their own: in the run's they would be a second point at iteration 0."""
    for command, prefix in (("validate", "val"), ("test", "test")):
        main([command, "--config", "tiny.yaml"])
        content = json.loads((lab / "run" / "evaluations" / f"{command}.json").read_text())["starts"]
        events = EventAccumulator(str(lab / "run" / "evaluations" / command / "_curves")).Reload()
        (accuracy,) = events.Scalars(f"{prefix}/starts/avg@4")
        assert (accuracy.step, accuracy.value) == (0, pytest.approx(content["avg_at_k"]["mean"]))
        drawn = {event.step: event.value for event in events.Scalars(f"{prefix}/starts/pass@j")}
        assert drawn == pytest.approx({int(j): estimate["mean"] for j, estimate in content["pass_at_k"].items()})

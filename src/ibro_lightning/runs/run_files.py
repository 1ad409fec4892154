"""Every name that a command writes in a run's folder. Anything not listed here is not ours, and is never replaced,
moved or removed. ``docs/files.md`` is generated from it: ``python -m ibro_lightning.runs.run_files``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

MARK = ".ibro_lightning"
"""The first file in a run's folder; see :mod:`.marks`."""
EVENTS = "events.out.tfevents.*"
"""Pattern of the curves of a TensorBoard logger."""
METRICS = "metrics.csv"
"""The curves of a CSV logger."""
MOVING = MARK + ".moving"
"""Marks a folder into which a run's files are being moved."""
_UNFINISHED = re.compile(r"(?:model|critic|adapter)[.\d]*(?:\.old)?\.partial/|checkpoints/[^/]+\.partial/")
_TOKENS = {
    "<iteration>": r"\d{6,}",
    "<batch>": r"\d{4,}",
    "<n>": r"\d+",
    "<set>": r"[^/]+",
    "<evaluation>": r"(?:iteration_\d{6,}|validate|test)",
    "<events>": r"events\.out\.tfevents\.\d{10}\.[^/]+\.\d+\.\d+",
    "<shard>": r"(?:\.metadata(?:\.tmp)?|__\d+_\d+\.distcp|meta\.pt|manifest\.json)",
    "<file>": r".+",
}
_SHARD = re.compile(_TOKENS["<shard>"] + r"(?:\.partial)?")


def _pattern(template: str) -> str:
    pieces = re.split(r"(<\w+>|\[|\])", template)
    symbols = {**_TOKENS, "[": "(?:", "]": ")?"}
    return "".join(symbols.get(piece) or re.escape(piece) for piece in pieces)


def _folders_of(name: str) -> re.Pattern[str]:
    parents = name.split("/")[:-1]
    paths = ["/".join(parents[: depth + 1]) for depth in range(len(parents))]
    return re.compile("|".join(_pattern(path) for path in paths) or r"(?!)")


@dataclass(frozen=True)
class Entry:
    """One kind of file in a run's folder.

    Args:
        name: template of its path; ``[…]`` is optional.
        part: what a command claims before it writes such files: the first component of their path, without numbers.
        by: the commands that write it.
        end: what replaces, moves or removes it.
        meaning: description for the documentation.
    """

    name: str
    part: str
    by: str
    end: str
    meaning: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches its path, and the temporary path while it is being written."""
        return re.compile(_pattern(self.name) + r"(?:\.partial)?")

    @cached_property
    def folders(self) -> re.Pattern[str]:
        """Matches the folders that contain it."""
        return _folders_of(self.name)

    @cached_property
    def fixed_folders(self) -> re.Pattern[str]:
        """Matches those folders whose names do not depend on the settings."""
        return _folders_of(self.name.split("<set>")[0])


MODELS = ("model", "critic", "adapter")
"""Parts whose files may have any name: a manifest (:mod:`.model_folders`) lists them."""
_REPEATED = "a resumed run rewrites those after its checkpoint"

CATALOG = (
    Entry(MARK + "[.<n>.partial]", MARK, "every command", "every command updates it",
          "marks the folder as a run's, and lists which of the names below are the run's"),
    Entry(MOVING, MARK, "fit", "the next command", "shows that a run's files are being moved here"),
    Entry("config[.<n>].yaml", "config.yaml", "fit", "a resumed run rewrites it", "every setting"),
    Entry("rollouts/iteration_<iteration>[_rank_<n>].parquet", "rollouts", "fit", _REPEATED, "all sampled responses"),
    Entry("evaluations/<evaluation>[.<n>].json", "evaluations", "fit, validate, test", "another evaluation moves it to "
          "`validate.1.json`; " + _REPEATED, "results"),
    Entry("evaluations/<evaluation>[.<n>]/_manifest.json", "evaluations", "fit, validate, test", "as the results",
          "the policy, prompts and settings that the samples come from"),
    Entry("evaluations/<evaluation>[.<n>]/<set>/batch_<batch>.parquet", "evaluations", "fit, validate, test",
          "as the results", "samples"),
    Entry("evaluations/<evaluation>[.<n>]/_curves/<events>", "evaluations", "validate, test", "as the results",
          "the results for TensorBoard"),
    Entry("checkpoints/iteration_<iteration>.ckpt[.old.partial][.partial]", "checkpoints", "fit",
          "`checkpoint.keep_last` and `keep_best`", "a checkpoint, a file"),
    Entry("checkpoints/iteration_<iteration>.ckpt[.old][.partial]/<shard>", "checkpoints", "fit",
          "`checkpoint.keep_last` and `keep_best`", "the same as a folder of shards"),
    Entry("checkpoints/iteration_<iteration>.ckpt.damaged[.<n>]", "checkpoints", "fit", "nothing",
          "a damaged checkpoint, which a run skipped when it resumed from an older one"),
    Entry("checkpoints/iteration_<iteration>.ckpt.damaged[.<n>]/<shard>", "checkpoints", "fit", "nothing",
          "the same as a folder of shards"),
    Entry("checkpoints/written.txt", "checkpoints", "fit", "every checkpoint updates it",
          "which checkpoints the run wrote"),
    Entry("checkpoints/last.ckpt", "checkpoints", "fit", "the next checkpoint", "a link to the newest checkpoint"),
    Entry("checkpoints/end.json", "checkpoints", "fit", "a resumed run, at its end", "how training ended"),
    *(Entry(f"{part}[.<n>][.old][.partial]/<file>", part, by, "a resumed run replaces it; one that was changed, or an "
            f"export's, is moved to `{part}.1`", meaning)
      for part, by, meaning in (("model", "fit", "the policy"), ("critic", "fit with PPO", "the critic"),
                                ("adapter", "fit with LoRA", "the adapters, as peft keeps them"))),
    Entry("nonfinite/iteration_<iteration>_rank_<n>[.<n>].pt", "nonfinite", "fit", "nothing",
          "tensors of the step that was not finite"),
    Entry("nonfinite/iteration_<iteration>_rank_<n>[.<n>].parquet", "nonfinite", "fit", "nothing",
          "its responses"),
    Entry("summary.json", "summary.json", "fit", "a resumed run, at its end", "what the run achieved"),
    *(Entry(f"{by}[.<n>].yaml", f"{by}.yaml", by, f"another {by} moves it to `{by}.1.yaml`", "every setting")
      for by in ("validate", "test", "predict")),
    Entry("predictions[.<n>]/<set>/batch_<batch>[_rank_<n>].parquet", "predictions", "predict", "another predict moves "
          "them to `predictions.1`; those of one that was killed are removed", "sampled responses"),
    Entry("predictions[.<n>]/_manifest.json", "predictions", "predict", "as the responses", "whether all are there"),
)  # fmt: skip
"""In the order of the documentation. Loggers' files are recognised by the process that wrote them: :class:`.Mark`."""

PARTS = {
    "fit": ("config.yaml", "rollouts", "evaluations", "checkpoints", *MODELS, "nonfinite", "summary.json"),
    "validate": ("validate.yaml", "evaluations"),
    "test": ("test.yaml", "evaluations"),
    "predict": ("predict.yaml", "predictions"),
}
"""The parts that each command claims."""


def entry_of(path: str) -> Entry | None:
    """The catalogue's entry for a file's path in the run's folder, with slashes, if any."""
    path = _without_earlier(path)
    return next((entry for entry in CATALOG if entry.pattern.fullmatch(path)), None)


def is_shard(name: str) -> bool:
    """Whether this package or DCP writes files of that name into a checkpoint's folder."""
    return _SHARD.fullmatch(name) is not None


def is_unfinished(path: str) -> bool:
    """Whether a file (see :func:`entry_of`) was left by a process that died while writing or removing it."""
    return path.endswith(".partial") or _UNFINISHED.match(path) is not None


def part_of_folder(path: str) -> str | None:
    """The part to which a folder of this name belongs, if any; see :func:`entry_of`."""
    path = _without_earlier(path)
    return next((entry.part for entry in CATALOG if entry.folders.fullmatch(path)), None)


def _without_earlier(path: str) -> str:
    return re.sub(r"^earlier\.\d+(?:\.partial)?/", "", path)


def table() -> str:
    """The catalogue as Markdown."""
    rows = [(f"`{entry.name}`", entry.meaning, entry.by, entry.end) for entry in CATALOG]
    lines = [" | ".join(row) for row in (("name", "what it is", "written by", "replaced, moved or removed by"), *rows)]
    return "\n".join([f"| {lines[0]} |", "| --- | --- | --- | --- |", *(f"| {line} |" for line in lines[1:])])


if __name__ == "__main__":
    print(table())

"""``python -m ibro_lightning study``: runs a study file, or says what it would take."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ibro_lightning.errors import ConfigError, UserError
from ibro_lightning.runs.recipes import resolve_configs
from ibro_lightning.studies.jobs import Execution, Jobs
from ibro_lightning.studies.power import minimum_detectable_difference, pairs_needed
from ibro_lightning.studies.progress_table import Progress, elapsed
from ibro_lightning.studies.runner import StudyRunner
from ibro_lightning.studies.store import ResultsStore
from ibro_lightning.studies.study_file import Study, build_study, parsed, study_parser


def main(argv: Sequence[str]) -> None:
    """Run ``study``."""
    options = parsed(study_arguments(), resolve_configs(argv))
    study, execution = build_study(options), Execution(**options["execution"])
    output = Path(options["output"] or f"runs/studies/{study.name}")
    results = Path(options["results"] or output / "results")
    check_trials(study)
    store = ResultsStore(study, results)
    if options["dry_run"]:
        print("\n".join(dry_run(study, execution, output, store)))
        return
    progress = Progress(study, output, store, execution.limit(len(study.seeds) * len(study.all_arms())))
    jobs = Jobs(execution, output.absolute() / "jobs")
    file = in_repository(options["config"])
    StudyRunner(study, jobs, output, store, progress, retry_failed=options["retry_failed"], file=file).run()
    print(f"\nresults   {results}\nreport    python -m ibro_lightning report {results}")
    if failed := store.failures():
        raise TrialsFailed(failed)


class TrialsFailed(UserError):
    """Some trials have failed for good; the others are finished."""

    def __init__(self, failed: Mapping[str, str]) -> None:
        name, error = next(iter(failed.items()))
        super().__init__(f"{len(failed)} trials have failed, such as {name}: {error}; --retry_failed starts them again")


def in_repository(configs: Sequence[Any] | None) -> str:
    """The study file's place in its repository; empty without one."""
    if not configs:
        return ""
    path = Path(str(configs[-1])).resolve()
    command = ["git", "-C", str(path.parent), "rev-parse", "--show-prefix"]
    try:
        prefix = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return prefix + path.name


def study_arguments() -> ArgumentParser:
    """The command line of ``study``: a study file's fields, and how it is run."""
    parser = study_parser()
    parser.add_class_arguments(Execution, "execution")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the trials: runs/studies/NAME")
    parser.add_argument("--results", type=str | None, default=None, help="folder of the results: OUTPUT/results")
    parser.add_argument("--retry_failed", action="store_true", help="start failed trials again")
    parser.add_argument("--dry_run", action="store_true", help="only print trials, time, disk and what can be found")
    return parser


def check_trials(study: Study) -> None:
    """Raise :class:`ConfigError` for an arm whose settings the recipe's command line refuses.

    One seed is enough. Another process does it, since it needs torch and this one may wait for days.
    """
    seed = study.seeds[0]
    base = [f"--{study.base_policy.key}", "its base policy"] if study.base_policy else []
    trials = {trial.name: [*trial.arguments, *base] for trial in study.trials() if trial.seed == seed}
    if first := study.base(seed):
        trials["base_policy"] = [*first.arguments]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for name, refusal in zip(trials, pool.map(refusal_of, trials.values()), strict=True):
            if refusal:
                raise ConfigError("arms", name.split("/")[0], refusal)


def refusal_of(arguments: Sequence[str]) -> str:
    """What ``fit`` answers to settings that it refuses; empty if it takes them."""
    from ibro_lightning.cli.run import main as run

    printed = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(printed):
        try:
            run(["fit", *arguments, "--print_config"])
        except UserError as error:
            return str(error)
        except SystemExit as end:
            if end.code not in (None, 0):
                return printed.getvalue().strip().splitlines()[-1].removeprefix("error: ")
    return ""


def dry_run(study: Study, execution: Execution, output: Path, store: ResultsStore) -> list[str]:
    """What a study would take, and what it could find."""
    trials = list(study.trials())
    left = [trial for trial in trials if store.state_of(trial) is None]
    at_once = execution.limit(len(left))
    lines = [
        f"{study.name}: {len(study.all_arms())} arms x {len(study.seeds)} seeds = {len(trials)} trials, "
        f"{len(trials) - len(left)} of them done; {at_once} at once, {execution.threads} threads each",
    ]
    seconds, megabytes = store.mean_of("trial/wall_s"), store.mean_of("trial/disk_mb")
    if seconds is None or megabytes is None:
        lines.append("time and disk: unknown until one trial is finished")
    else:
        in_all = elapsed(seconds * len(left) / at_once)
        lines.append(f"time: {elapsed(seconds)} per trial, as in those that are finished: {in_all} in all")
        lines.append(f"disk: {megabytes:.0f} MB per trial, {megabytes * len(left) / 1000:.1f} GB more in {output}")
    return [*lines, *detectable(study)]


def detectable(study: Study) -> list[str]:
    """The smallest difference that the planned number of seeds can find."""
    plan, seeds, pairs = study.plan, len(study.seeds), len(study.plan.comparisons)
    lines = []
    if plan.paired_sd is None:
        lines.append("smallest difference that can be found: unknown without plan.paired_sd, from a pilot")
    elif pairs:
        alone, corrected = (
            minimum_detectable_difference(plan.paired_sd, seeds, plan.level / count) for count in (1, pairs)
        )
        lines.append(
            f"smallest difference in {plan.metric} that {seeds} seeds find in 80 % of such studies: {alone:.3g}, and "
            f"{corrected:.3g} after correction for {pairs} comparisons; {plan.difference_that_matters:g} matters"
        )
    if pairs and (needed := pairs_needed(plan.level, pairs)) > seeds:
        lines.append(
            f"warning: with {seeds} seeds the test cannot reach {plan.level:g} for {pairs} comparisons: {needed} can"
        )
    return lines

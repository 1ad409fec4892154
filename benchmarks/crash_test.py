"""The long crash test: kill commands (SIGKILL, now and then SIGTERM) before random file operations and at random times,
have one like it go on, every tenth time two at once, and compare all that is left, bit for bit, with what an
undisturbed command leaves. Files of other people lie in and beside the run's folder, and must all be there afterwards.

    python benchmarks/crash_test.py --moments 200 --seed 0
    python benchmarks/crash_test.py --kinds ddp shards --moments 40 --minutes 20 --progress crash.jsonl

Kinds take turns. With ``--progress``, a run of the same seed goes on after the last trial in that file.
tests/test_crash.py does a few of these.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.crash_trials import FOREIGN, KINDS, LIKE_OURS, Bench
from helpers.processes import start_ranks
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath


def make_policy(folder: Path) -> Path:
    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


def read_progress(path: Path | None, seed: int) -> list[dict[str, Any]]:
    """The trials of that seed that are done. A line that was not finished is none."""
    done = []
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        try:
            trial = json.loads(line)
        except json.JSONDecodeError:
            continue
        if trial["seed"] == seed:
            done.append(trial)
    return done


def report(trials: list[dict[str, Any]]) -> str:
    """A line per kind, and one of all."""
    groups = defaultdict(list)
    for trial in trials:
        groups[trial["kind"]].append(trial)
    lines = [_line(kind, group) for kind, group in sorted(groups.items())]
    return "\n".join([*lines, _line("all", trials)])


def _line(name: str, trials: list[dict[str, Any]]) -> str:
    wrong = sum(bool(trial["differences"]) for trial in trials)
    touched = sum(len(trial["touched"]) for trial in trials)
    two = [trial for trial in trials if trial["starts"] > 1]
    return (
        f"{name:<9} {sum(trial['killed'] for trial in trials):>3} kills in {len(trials):>3} trials: "
        f"{wrong} with differences, {touched} foreign files touched; {len(two)} times two starts, "
        f"{sum(trial['refused'] for trial in two)} refused; {sum(trial['seconds'] for trial in trials):.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--moments", type=int, default=200, help="trials, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after so many")
    parser.add_argument("--progress", type=Path, help="a file with a line of JSON per trial, which is gone on with")
    settings = parser.parse_args()
    trials = read_progress(settings.progress, settings.seed)
    done = {(trial["kind"], trial["number"]) for trial in trials}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        policy = make_policy(Path(place, "policy"))
        for process in start_ranks(1, print, folder=Path(place)):  # starts the server that all others fork from
            process.join()
        benches = {
            kind: Bench(kind, KINDS[kind], Path(place, kind), policy, (*FOREIGN, *LIKE_OURS), settings.seed)
            for kind in settings.kinds
        }
        for number in range(settings.moments):
            kind = settings.kinds[number % len(settings.kinds)]
            if time.perf_counter() - begun > 60 * settings.minutes:
                print(f"stopped after {settings.minutes:g} minutes", flush=True)
                break
            if (kind, number) in done:
                continue
            _ = benches[kind].reference
            started = time.perf_counter()
            outcome = benches[kind].trial(number, starts=2 if number % 10 == 9 else 1)
            outcome.seconds = time.perf_counter() - started
            trials.append(outcome.as_json() | {"seed": settings.seed})
            if settings.progress is not None:
                with settings.progress.open("a") as file:
                    file.write(json.dumps(trials[-1]) + "\n")
            told = f"{outcome.moment}{' twice' * (outcome.starts > 1)}: {outcome.seconds:.1f} s"
            wrong = [*outcome.differences, *(f"touched {path}" for path in outcome.touched)]
            print(f"{number + 1}/{settings.moments} {kind} {told}{''.join(f', {one}' for one in wrong)}", flush=True)
    print(report(trials))
    raise SystemExit(any(trial["differences"] or trial["touched"] for trial in trials))


if __name__ == "__main__":
    main()

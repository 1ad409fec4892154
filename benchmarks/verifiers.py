r"""What verifiers wrongly accept and wrongly refuse, kind by kind, on the same pairs of a gold and an answer.

    python benchmarks/verifiers.py ../shared/data/*.jsonl                  # ours, math-verify, the DAPO rule
    python benchmarks/verifiers.py GOLDS... --only ours --per_kind 0       # ours alone, on every pair
    python benchmarks/verifiers.py GOLDS... --trl                          # and TRL's accuracy reward
    python benchmarks/verifiers.py GOLDS... --sample 300                   # prints pairs for reading by eye
    python benchmarks/verifiers.py --only ours --per_kind 0 --wrong        # our own golds; and what ours gets wrong

The pairs are other writings of each gold (right) and near-misses (wrong), true by construction
(``benchmarks/verifier_pairs``): of the golds in the files, and of golds that we write ourselves, whose kinds no file
has. sympy confirms labels independently of every verifier, and a pair whose label it contradicts ends the run: closed
numbers to 60 digits; of our own golds everything but words and sentences, at points that tell the two apart or do not.
``--trl`` needs trl installed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from verifier_pairs import Pair, own_pairs, pairs_of
from verifier_pairs.checks import check
from verifier_pairs.near_misses import NEAR_MISSES
from verifier_pairs.own_golds import KINDS_OF_OWN
from verifier_pairs.writings import WRITINGS

Verifier = Callable[[str, str], bool]
"""Whether a response is right, from the response and the gold."""
FILES = {*WRITINGS, *NEAR_MISSES}
OWN = {kind for _, kind in KINDS_OF_OWN}
"""The names of the kinds of pairs of the files' golds, and of our own."""


def line(pair: Pair) -> str:
    """The gold, whether the answer is the same, the answer (or whole response, on one line), and its kind."""
    answer = pair.answer.replace("\n", "⏎")
    return f"{pair.gold.text} {'≡' if pair.same else '≢'} {answer} ‖ {pair.kind}"


def distinct_golds(files: Iterable[Path]) -> list[str]:
    """The different texts of the field ``answer``, in the order of the files."""
    golds: dict[str, None] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line).get("answer")
            if isinstance(answer, str | int | float):
                golds.setdefault(str(answer))
    return list(golds)


def pairs(golds: Iterable[str], per_kind: int, seed: int = 0) -> list[Pair]:
    """All pairs of the golds, or at most ``per_kind`` of each kind, drawn at random."""
    return drawn((pair for gold in golds for pair in pairs_of(gold)), per_kind, seed)


def drawn(found: Iterable[Pair], per_kind: int, seed: int = 0) -> list[Pair]:
    """All of these pairs, sorted by kind, or at most ``per_kind`` of each kind, drawn at random."""
    by_kind: dict[tuple[bool, str], list[Pair]] = defaultdict(list)
    for pair in found:
        by_kind[pair.same, pair.kind].append(pair)
    generator = random.Random(seed)
    for kind, pairs_of_it in by_kind.items():
        if per_kind and len(pairs_of_it) > per_kind:
            by_kind[kind] = generator.sample(pairs_of_it, per_kind)
    return [pair for pairs_of_it in by_kind.values() for pair in pairs_of_it]


def check_labels(found: Iterable[Pair]) -> int:
    """How many labels sympy confirms, where there is something to compute. Raises for a wrong label."""
    return sum(check(pair) for pair in found)


def ours() -> Verifier:
    from ibro_lightning.rewards import math_verify_score

    return lambda response, gold: math_verify_score(response, gold) == 1.0


def library() -> Verifier:
    from math_verify import parse, verify

    def judge(response: str, gold: str) -> bool:
        right = parse(f"${gold}$", parsing_timeout=None)
        return bool(verify(right, parse(response, parsing_timeout=None), timeout_seconds=None))

    return judge


def dapo(strict: bool) -> Verifier:
    from ibro_lightning.rewards import dapo_score

    return lambda response, gold: dapo_score(f"Answer: {response}", gold, strict=strict) == 1.0


def trl() -> Verifier:
    from trl.rewards import accuracy_reward

    def judge(response: str, gold: str) -> bool:
        [score] = accuracy_reward([[{"role": "assistant", "content": response}]], [f"${gold}$"])
        return score == 1.0

    return judge


def measured(judge: Verifier, found: list[Pair]) -> tuple[dict[tuple[bool, str], int], float, list[Pair]]:
    """Wrong verdicts by kind, the median time of a verdict in milliseconds, and the pairs that were judged wrong."""
    wrong: Counter[tuple[bool, str]] = Counter()
    times, mistaken = [], []
    for pair in found:
        started = time.perf_counter()
        try:
            same = judge(pair.response, pair.gold.text)
        except Exception:  # a verifier that raises has not accepted
            same = False
        times.append(time.perf_counter() - started)
        if same != pair.same:
            wrong[pair.same, pair.kind] += 1
            mistaken.append(pair)
    return dict(wrong), 1000 * statistics.median(times), mistaken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golds", nargs="*", type=Path, help="files of JSON lines with a field answer")
    parser.add_argument("--per_kind", type=int, default=100, help="pairs of a kind, drawn at random; 0: all")
    names = ["ours", "math-verify", "dapo strict", "dapo lenient", "trl"]
    parser.add_argument("--only", choices=names, help="one verifier")
    parser.add_argument("--trl", action="store_true", help="TRL's accuracy reward, too")
    parser.add_argument("--sample", type=int, default=0, help="print so many pairs instead")
    parser.add_argument("--wrong", action="store_true", help="print the pairs that ours judges wrong")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    golds = distinct_golds(path for path in options.golds if "verifier_cases" not in path.name)
    found = [*pairs(golds, options.per_kind), *drawn(own_pairs(), options.per_kind)]
    if options.sample:
        for pair in random.Random(1).sample(found, min(options.sample, len(found))):
            print(line(pair))
        return
    kinds_of = Counter(same for same, _ in {(pair.same, pair.kind) for pair in found})
    print(f"{kinds_of[True]} kinds of other writings and {kinds_of[False]} of near-misses")
    print(f"{len(found)} pairs, {check_labels(found)} of which have a label that sympy confirms")
    judges = {
        "ours": ours,
        "math-verify": library,
        "dapo strict": lambda: dapo(True),
        "dapo lenient": lambda: dapo(False),
    }
    if options.trl or options.only == "trl":
        judges["trl"] = trl
    if options.only:
        judges = {options.only: judges[options.only]}
    counts = Counter((pair.same, pair.kind) for pair in found)
    results = {name: measured(make(), found) for name, make in judges.items()}
    for same, title in ((False, "wrongly accepted"), (True, "wrongly refused")):
        print(f"\n{title:47} {'pairs':>6} " + " ".join(f"{name:>13}" for name in judges))
        kinds = [(key, count) for key, count in counts.items() if key[0] is same]
        for key, count in sorted(kinds, key=lambda entry: entry[0][1]):
            shares = [100 * wrong.get(key, 0) / count for wrong, _, _ in results.values()]
            print(f"{key[1]:47} {count:6} " + " ".join(f"{share:11.1f} %" for share in shares))
        for whose, some in (("of the files", FILES), ("of our own", OWN), ("all", FILES | OWN)):
            counted = [(key, count) for key, count in kinds if key[1] in some]
            if total := sum(count for _, count in counted):
                wrongs = [sum(wrong.get(key, 0) for key, _ in counted) for wrong, _, _ in results.values()]
                print(f"{whose:47} {total:6} " + " ".join(f"{100 * wrong / total:11.2f} %" for wrong in wrongs))
    print(f"\n{'milliseconds per verdict, median':54} " + " ".join(f"{time:13.2f}" for _, time, _ in results.values()))
    if options.wrong and "ours" in results:
        for pair in results["ours"][2]:
            print(line(pair))


if __name__ == "__main__":
    main()

"""The long crash test: kill runs (SIGKILL) before every single file operation and at random times, let them go on, and
compare all they leave, bit for bit, with a run that was not killed. tests/test_crash.py does a few of these.

    python benchmarks/crash_test.py --algorithm PPOModule --moments 200 --seed 0
    python benchmarks/crash_test.py --algorithm DAPOModule --ranks 2 --moments 40

Half of the moments are file operations, spread evenly over the run, the others times drawn with ``--seed``. Every
moment is a run of its own; with ``--chain 5``, five kills come one after the other before the run may end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import USER_CODE
from crash_helpers import Moment, Reference, differences, go_on, kill, write_recipe
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath


def make_policy(folder: Path) -> Path:
    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


def draw_moments(reference: Reference, count: int, seed: int) -> list[Moment]:
    """Half of them file operations at equal distances, half of them times; in random order."""
    draw = random.Random(seed)
    files = count // 2
    moments = [Moment("file", 1 + i * reference.changes // files) for i in range(files)] if files else []
    moments += [Moment("time", draw.uniform(0.1, reference.seconds)) for _ in range(count - files)]
    draw.shuffle(moments)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=["DAPOModule", "PPOModule"], default="DAPOModule")
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--chain", type=int, default=1, help="kills before a run may end")
    parser.add_argument("--ranks", type=int, default=1, help="more than one: fsdp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", action="store_true", help="several ranks write checkpoints as folders of shards")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_recipe(folder, settings.algorithm, make_policy(folder / "policy"), USER_CODE, folders=settings.folders)
        fit = ["--ckpt_path", "last"]
        Reference.make(
            folder, ranks=settings.ranks
        )  # the first one is slow: it starts the server that others fork from
        (folder / "reference").rename(folder / "other")
        reference = Reference.make(folder, ranks=settings.ranks)
        found = differences(reference.folder / "reference", folder / "other")
        assert not found, f"two undisturbed runs differ: {found}"
        moments = draw_moments(reference, settings.moments, settings.seed)
        started, killed, wrong = time.perf_counter(), 0, 0
        for first in range(0, len(moments), settings.chain):
            chain = moments[first : first + settings.chain]
            for number, moment in enumerate(chain):
                killed += kill(folder, moment, *fit, ranks=settings.ranks, fresh=not number)
            go_on(folder, ranks=settings.ranks)
            if found := differences(folder / "reference", folder / "run"):
                wrong += 1
                print(f"{', '.join(map(str, chain))}: {found}", flush=True)
    print(
        f"{settings.algorithm}, {settings.ranks} rank(s): {reference.changes} file operations in a run of "
        f"{reference.seconds:.1f} s; {killed} of {len(moments)} kills hit it; {wrong} runs ended differently "
        f"({time.perf_counter() - started:.0f} s)"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

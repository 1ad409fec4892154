"""Stands in for ``python -m ibro_lightning`` in tests of studies: a run of some milliseconds that leaves a run's files.

``behaviour.json`` in the study's folder says what a trial does otherwise: ``fail`` (once) ends with an error, ``wait``
trains until it is asked to stop.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

SETS = {"paths": {"samples": 2, "sampling": {"temperature": 1.0, "max_tokens": 8}}}


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--trainer.default_root_dir", dest="folder", type=Path)
    parser.add_argument("--seed_everything", dest="seed", type=int)
    parser.add_argument("--model.quality", dest="quality", type=float, default=0.0)
    parser.add_argument("--data.eval_sets", dest="sets", type=json.loads)
    known, _ = parser.parse_known_args()
    known.folder.mkdir(parents=True, exist_ok=True)
    behave(known.folder)
    if known.command == "validate":
        results = {name: evaluate(known.folder / "evaluations/validate", name, known) for name in known.sets}
        (known.folder / "evaluations/validate.json").write_text(json.dumps(results))
        return
    (known.folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"eval_sets": SETS}}}))
    (known.folder / "model").mkdir(exist_ok=True)
    (known.folder / "model/model.safetensors").write_bytes(b"weights of seed %d" % known.seed)
    writer = EventFileWriter(str(known.folder))
    for iteration in range(3):
        metrics = {"val/paths/avg@2": known.quality} if iteration != 1 else {}
        metrics |= {"rollout/length": 2.0 + iteration, "time/total_s": time.time()} if iteration else {}
        for name, value in metrics.items():
            writer.add_event(Event(step=iteration, summary=scalar_pb(name, value), wall_time=0.0))
    writer.close()
    result = {"paths": evaluate(known.folder / "evaluations/iteration_000002", "paths", known)}
    (known.folder / "evaluations/iteration_000002.json").write_text(json.dumps(result))


def behave(folder: Path) -> None:
    """What the test asks of this trial."""
    trial = f"{folder.parent.name}/{folder.name}"
    behaviours = folder.parents[2] / "behaviour.json"
    asked = json.loads(behaviours.read_text()) if behaviours.exists() else {}
    with (folder.parents[1] / "started.txt").open("a") as file:
        file.write(f"{trial}\n")
    behaviour = asked.get(trial)
    starts = (folder.parents[1] / "started.txt").read_text().splitlines().count(trial)
    if behaviour == "fail" or (behaviour == "fail once" and starts == 1):
        sys.exit("error: model.quality: -1 - write 0 or more")
    if behaviour == "wait" and starts == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (folder / "is_waiting").touch()
        while True:
            time.sleep(0.05)


def evaluate(folder: Path, name: str, known: object) -> dict[str, object]:
    """Leave samples of two questions: ``quality`` is the first one's accuracy."""
    rows = [
        {
            "prompt_id": question,
            "prompt": f"{question}:",
            "answer": "1",
            "response": "one",
            "reward_accuracy": accuracy,
            "mean_logp": -0.5,
            "response_tokens": tokens,
        }
        for question, accuracy, tokens in (("a", known.quality, 1), ("a", known.quality, 3), ("b", 0.0, 4))
    ]
    (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name / "batch_0000.parquet")
    return {"samples": 2, "avg_at_k": {"mean": known.quality}}


if __name__ == "__main__":
    main()

"""Fails unless a quick start did what the README promises: a visible rise, from a mediocre base to a good policy."""

import argparse
import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("summary", type=Path)
parser.add_argument("--rise", type=float, required=True, help="of the held-out accuracy, at least")
parser.add_argument("--final", type=float, required=True, help="held-out accuracy after training, at least")
parser.add_argument(
    "--explained-variance", type=float, help="of the critic, mean over the last 20 iterations, at least"
)
parser.add_argument("--base-below", type=float, default=0.4, help="held-out accuracy before training, at most")
parser.add_argument(
    "--sync-difference", type=float, help="|logp difference| of engine and trainer after a sync, at most"
)
arguments = parser.parse_args()

summary = json.loads(arguments.summary.read_text())
before, after = summary["accuracy_before"], summary["accuracy_after"]
AutoModelForCausalLM.from_pretrained(summary["model_dir"])
events = EventAccumulator(summary["log_dir"])
events.Reload()


def curve(name: str) -> list[float]:
    return [event.value for event in events.Scalars(name)]


entropy = curve("policy/entropy")
checks = {
    f"base accuracy {before:.1%} lies between 10 % and {arguments.base_below:.0%}": 0.1
    <= before
    <= arguments.base_below,
    f"accuracy after training {after:.1%} is at least {arguments.final:.0%}": after >= arguments.final,
    f"it rose by {after - before:.1%}, at least {arguments.rise:.0%}": after - before >= arguments.rise,
    f"entropy stayed finite and above 0 (lowest {min(entropy):.3f} nats)": all(
        math.isfinite(h) and h > 0 for h in entropy
    ),
}
if arguments.explained_variance is not None:
    explained = sum(curve("critic/explained_variance")[-20:]) / 20
    checks[f"the critic explains {explained:.2f} of the return's variance"] = explained > arguments.explained_variance
if arguments.sync_difference is not None:
    measured = curve("sync/logp_difference_max")
    checks[f"after {len(measured)} syncs |logp difference| was at most {max(measured):.1e} nats"] = (
        len(measured) > 0 and max(measured) <= arguments.sync_difference
    )
for text, holds in checks.items():
    print(("ok    " if holds else "FAIL  ") + text)
print(f"reinforcement learning took {summary['seconds']:.0f} s")
sys.exit(0 if all(checks.values()) else 1)

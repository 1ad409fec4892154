"""Fails unless the quick start did what the README promises: a visible rise, from a mediocre base to a good policy."""

import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

summary = json.loads(Path(sys.argv[1]).read_text())
before, after = summary["accuracy_before"], summary["accuracy_after"]
AutoModelForCausalLM.from_pretrained(summary["model_dir"])
events = EventAccumulator(summary["log_dir"])
events.Reload()
entropy = [event.value for event in events.Scalars("policy/entropy")]

checks = {
    f"base accuracy {before:.1%} lies between 10 % and 40 %": 0.10 <= before <= 0.40,
    f"accuracy after training {after:.1%} is at least 65 %": after >= 0.65,
    f"it rose by {after - before:.1%}, at least 30 points": after - before >= 0.30,
    f"entropy stayed finite and above 0 (lowest {min(entropy):.3f} nats)": all(
        math.isfinite(h) and h > 0 for h in entropy
    ),
}
for text, holds in checks.items():
    print(("ok    " if holds else "FAIL  ") + text)
print(f"reinforcement learning took {summary['seconds']:.0f} s")
sys.exit(0 if all(checks.values()) else 1)

#!/usr/bin/env bash
# verl 0.9.1: the GRPO and RLOO advantage of a response that is alone in its group is its reward, unscaled.
# Guess: 0, as for every group whose rewards are equal: there is nothing to compare it with. A second response with the
# same reward does give 0 to both.
# What happens: a group of one has no mean subtracted, so with one response per prompt, or where the others of a group
# were dropped, GRPO is REINFORCE without a baseline for these rows: all right ones are pushed up, all wrong ones down.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet verl==0.9.1
"$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_rloo_outcome_advantage

print(f"verl {version('verl')}, torch {torch.__version__}")
rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, -1.0]])
mask = torch.ones_like(rewards)
groups = np.array(["two", "two", "right, alone", "wrong, alone"])
for compute in (compute_grpo_outcome_advantage, compute_rloo_outcome_advantage):
    advantages, _ = compute(rewards.clone(), mask, groups)
    print(compute.__name__)
    for name, reward, advantage in zip(groups, rewards.sum(1).tolist(), advantages[:, 0].tolist(), strict=True):
        print(f"  group {name}: reward {reward:g}, guessed 0, found {advantage:g}")
    found = advantages[:, 0].tolist()
    assert found[:2] == [0, 0], found
    assert abs(found[2] - 1) < 1e-5, found
    assert abs(found[3] + 1) < 1e-5, found
PYTHON
echo "still so"

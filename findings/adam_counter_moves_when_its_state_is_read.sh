#!/usr/bin/env bash
# torch 2.13.0: asking for an optimizer's state dict (torch.distributed.checkpoint.state_dict) before its first step changes
# what the optimizer does afterwards.
# Guess: a getter leaves the optimizer as it was, or raises where there is no state yet.
# What happens: it makes the state by a step of learning rate 0, which leaves Adam's counter at 1. The bias corrections of
# all later steps are those of one step further on, and the weights differ from those of a run that was not looked at.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def trained(look):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if look:
        get_optimizer_state_dict(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()
    return int(optimizer.state[model.weight]["step"]), model.weight.detach()


(steps, weight), (steps_after_look, weight_after_look) = trained(look=False), trained(look=True)
print(f"torch {torch.__version__}, two steps of Adam")
print(f"never looked at:           counter {steps}, weights {weight.tolist()}")
print(f"looked at before the first: counter {steps_after_look}, weights {weight_after_look.tolist()}")
assert (steps, steps_after_look) == (2, 3)
assert not torch.allclose(weight, weight_after_look, atol=1e-3)
PY
echo "still so"

#!/usr/bin/env bash
# jsonargparse 4.53.0: an argument `optimizer: Callable[[Iterable], Optimizer]` with the default AdamW, and SGD chosen for it
# by name alone.
# Guess: SGD's own defaults, or an error for settings that were AdamW's. Nobody has written a weight decay.
# What happens: AdamW's default weight_decay of 0.01 stays, as SGD happens to have an argument of that name (its own default
# is 0). What SGD does not know (betas) goes. `--print_config` shows it, nothing else does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 "jsonargparse[signatures]==4.53.0"
"$work/venv/bin/python" - 2>/dev/null <<'PY'
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch
from jsonargparse import ArgumentParser
from torch.optim import SGD, AdamW, Optimizer


class Model:
    def __init__(self, optimizer: Callable[[Iterable], Optimizer] = AdamW) -> None:
        self.optimizer = optimizer([torch.zeros(1, requires_grad=True)])


def decay(*arguments):
    parser = ArgumentParser()
    parser.add_subclass_arguments(Model, "model", required=True)
    chosen = parser.parse_args(["--model", f"{__name__}.Model", *arguments])
    optimizer = parser.instantiate(chosen).model.optimizer
    return type(optimizer), optimizer.defaults["weight_decay"]


kind, chosen = decay("--model.optimizer", "torch.optim.SGD")
own = SGD([torch.zeros(1, requires_grad=True)]).defaults["weight_decay"]
print(f"jsonargparse {version('jsonargparse')}")
print(f"SGD by itself has weight_decay {own}; {kind.__name__} chosen over AdamW has {chosen}")
assert kind is SGD
assert (own, chosen) == (0, 0.01), (own, chosen)
PY
echo "still so"

#!/usr/bin/env bash
# lightning 2.6.6, torchmetrics 1.9.0, transformers 5.19.0: what `import lightning.pytorch` costs where transformers happens to
# be installed. (lightning's own utilities import torchmetrics.functional, whose BERTScore imports AutoModel if it finds
# transformers.)
# Guess: the same as without it, as lightning neither needs nor names transformers.
# What happens: it loads transformers' auto classes and what they need, 600 modules more (1,411 and 2,008), and takes nearly
# twice the CPU seconds (1.3 and 2.3 here), in every process that imports lightning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/count.py" <<'PY'
import sys
import time

import torch

before, loaded = time.process_time(), len(sys.modules)
import lightning.pytorch

there = "transformers.models.auto.auto_factory" in sys.modules
print(f"{len(sys.modules) - loaded} modules and {time.process_time() - before:.1f} CPU seconds after torch; transformers: {there}")
sys.exit(0 if there == (sys.argv[1] == "yes") else 1)
PY
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6 torchmetrics==1.9.0
"$work/venv/bin/python" -W ignore "$work/count.py" no > /dev/null 2>&1 || true # the first import compiles files
echo "without transformers:"
"$work/venv/bin/python" -W ignore "$work/count.py" no
"$work/venv/bin/python" -m pip install --quiet transformers==5.19.0
"$work/venv/bin/python" -W ignore "$work/count.py" yes > /dev/null 2>&1 || true
echo "with transformers installed, which nothing here asks for:"
"$work/venv/bin/python" -W ignore "$work/count.py" yes
echo "still so"

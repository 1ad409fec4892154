#!/usr/bin/env bash
# safetensors 0.8.0: a file that save_file writes can be read by its owner alone, whatever the umask asks for.
# Guess: with umask 022 a new file has the mode 0644, as with open(), torch.save and numpy.save; a model that one member of
# a group has exported can be read by the others.
# What happens: 0600, also where an earlier file of that name had another mode.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$work/modes.py" <<'PY'
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
from safetensors.numpy import save_file

folder = Path(sys.argv[1])
os.umask(0o022)
array = numpy.zeros(3, dtype=numpy.float32)
numpy.save(folder / "a.npy", array)
save_file({"a": array}, folder / "a.safetensors")
(folder / "b.safetensors").touch()  # 0644
save_file({"a": array}, folder / "b.safetensors")
modes = {path.name: oct(path.stat().st_mode & 0o777) for path in sorted(folder.glob("[ab].*"))}
print(f"safetensors {version('safetensors')}, umask 022: {modes}")
assert modes == {"a.npy": "0o644", "a.safetensors": "0o600", "b.safetensors": "0o600"}, modes
PY
"$work/venv/bin/python" "$work/modes.py" "$work"
echo "still so"

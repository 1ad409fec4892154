#!/usr/bin/env bash
# jsonargparse 4.53.0: the time to parse a configuration is exponential in how deep its classes are nested.
#
# LightningCLI reads a recipe's classes (class_path, init_args) by jsonargparse, and the arguments of a class may be classes again.
# One would guess that a configuration with one class more takes longer by that class: that the cost is linear in what is written.
# It is multiplied by about 2.4 with every level. Each level parses, serializes and validates the one below several times, for its
# defaults and its values, and so does that one. Four levels are nothing; eight take six million Python calls, for 16 lines of
# configuration. So recipes are better flat, and wrappers of wrappers (a schedule in a mixture in a filter) one class with a list.
#
# Calls are counted, as seconds depend on the machine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jsonargparse[signatures]==4.53.0" "PyYAML==6.0.3"
cat > "$folder/nested.py" <<'PYTHON'
import cProfile
import io
import pstats
from importlib.metadata import version

from jsonargparse import ArgumentParser


class Part:
    """Something that may hold another."""

    def __init__(self, inner: "Part | None" = None, size: int = 1) -> None:
        self.inner, self.size = inner, size


def nested(depth):
    inner = {"inner": nested(depth - 1)} if depth > 1 else {}
    return {"class_path": "__main__.Part", "init_args": {"size": depth, **inner}}


def calls(depth):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=Part)
    with cProfile.Profile() as profile:
        parsed = parser.parse_object({"part": nested(depth)})
    for level in range(depth, 0, -1):
        parsed = parsed.part if level == depth else parsed.init_args.inner
        assert parsed.init_args.size == level, "everything has been read"
    return pstats.Stats(profile, stream=io.StringIO()).total_calls


calls(1)  # what is imported and cached the first time
counts = {depth: calls(depth) for depth in range(2, 9)}
print(f"jsonargparse {version('jsonargparse')}")
print("classes in each other   calls to parse them   times those of one class fewer")
for depth, count in counts.items():
    print(f"{depth:21}   {count:19}   {count / counts[depth - 1] if depth > 2 else float('nan'):.2f}")
growth = (counts[8] / counts[4]) ** (1 / 4)
print(f"guessed: 8 classes take about twice the calls of 4. Found: {counts[8] / counts[4]:.0f} times, {growth:.2f} per level")
if growth < 1.8:
    raise SystemExit("this has changed: the cost is no longer exponential in the depth")
PYTHON
"$folder/venv/bin/python" "$folder/nested.py"

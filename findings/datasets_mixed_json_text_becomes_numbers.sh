#!/usr/bin/env bash
# datasets 5.2.0: one number in a JSON-lines column of texts, and every text of it that is itself JSON comes back decoded.
# Guess: "007" and "null" stay the texts that the file holds, as they do in a column of texts alone.
# What happens: the column gets the type Json, and "007" is 7, "null" is None, "1e3" is 1000.0, "[1, 2]" is a list, while
# "forty" stays. A dataset of answers changes its golds by what stands in other rows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

import datasets

work = Path(sys.argv[1])
texts = ["007", "null", "1e3", "[1, 2]", "forty"]


def loaded(name, answers):
    path = work / name
    path.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(work / f"cache_{name}"))


plain, mixed = loaded("texts.jsonl", texts), loaded("mixed.jsonl", [*texts, 12])
print(f"datasets {datasets.__version__}")
print(f"texts alone          {plain.features['answer']}  {plain['answer'][:]}")
print(f"and one number, 12   {mixed.features['answer']}  {mixed['answer'][:]}")
assert plain["answer"][:] == texts
as_guessed = mixed["answer"][:5] == texts
assert mixed["answer"][:] == [7, None, 1000.0, [1, 2], "forty", 12], mixed["answer"][:]
assert not as_guessed
PY
echo "still so"

#!/usr/bin/env bash
# transformers 5.19.0: a word-level tokenizer saved beside a Qwen2 config and opened again with AutoTokenizer.
# Guess: AutoTokenizer gives back what tokenizer.json and tokenizer_config.json (class TokenizersBackend) describe.
# What happens: beside a config of model_type qwen2 it opens the files as Qwen2Tokenizer, which splits text by Qwen's own
# rules first: "12 34 7" is five tokens in place of three, without a warning. Beside a Llama config it is three.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet transformers==5.19.0 tokenizers==0.23.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2>/dev/null <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

words = {word: number for number, word in enumerate(["12", "34", "7", "1", "2", "3", "4", "<unk>"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
print(f"transformers {transformers.__version__}")
opened = {}
for config in (LlamaConfig(), Qwen2Config()):
    folder = Path(sys.argv[1]) / config.model_type
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config.save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    again = AutoTokenizer.from_pretrained(folder)
    opened[config.model_type] = again("12 34 7")["input_ids"]
    print(f"beside {config.model_type}: written as {written}, opened as {type(again).__name__}: {opened[config.model_type]}")
assert opened == {"llama": [0, 1, 2], "qwen2": [3, 4, 5, 6, 2]}, opened
PY
echo "still so"

#!/usr/bin/env bash
# transformers 5.19.0: a model that was read from a GGUF file with plain float32 weights cannot be saved.
#
# transformers reads GGUF so that models can be trained further: weights are dequantized to ordinary float32 tensors. One would
# guess that such a model is like any other, and that save_pretrained writes it, above all if nothing in the file was quantized.
# It refuses: the config keeps a quantization_config with the method "gguf", and the quantizer that belongs to it says that it is
# not serializable. A training run that starts from a GGUF file thus fails when its first checkpoint is exported.
# What helps: delete the config's quantization_config, and set the model's hf_quantizer to None, before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.19.0" "gguf==0.19.0" "accelerate==1.15.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

LAYERS, WIDTH, HEADS, INNER, WORDS = 1, 32, 2, 64, 40
random = np.random.default_rng(0)
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_block_count(LAYERS)
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(INNER)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(WORDS)
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
shapes = {"token_embd": (WORDS, WIDTH), "output_norm": (WIDTH,), "output": (WORDS, WIDTH)}
for layer in range(LAYERS):
    shapes |= {f"blk.{layer}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.{layer}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.{layer}.{name}": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up")}
    shapes |= {f"blk.{layer}.ffn_down": (WIDTH, INNER)}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf", dtype=torch.float32)
kinds = {str(parameter.dtype) for parameter in model.parameters()}
print(f"transformers {transformers.__version__}, gguf file without quantization, parameters: {kinds}")
assert kinds == {"torch.float32"}
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("guessed: it is saved. Found:", str(error).splitlines()[0])
    assert "not serializable" in str(error), error
else:
    raise SystemExit("this has changed: the model is saved")

del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", dtype=torch.float32)
assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
print("without the two it is saved, and read again with the same weights")
PYTHON

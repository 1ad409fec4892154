"""A model of SmolLM2-135M's exact sizes with random weights, and a tokenizer under which our sums take as many tokens.

python -m peers.smollm2 FOLDER

SmolLM2-135M-Instruct's own weights would give the same time per token. Here a response practically never ends before
the limit, because EOS is one of 49,152 nearly equally likely tokens, and a response to a sum is right one time in 19.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
}
START, END, PAD, NEWLINE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|newline|>"
SYSTEM = "You are a helpful AI assistant named Smol LM , trained by Hugging Face"
TEMPLATE = (
    f"{START} system {NEWLINE} {SYSTEM} {END} {NEWLINE} "
    "{% for message in messages %}"
    f"{START} {{{{ message['role'] }}}} {NEWLINE} {{{{ message['content'] }}}} {END} {NEWLINE} "
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START} assistant {NEWLINE}{{% endif %}}"
)
"""SmolLM2-135M-Instruct's, with a token where that has a line break, for as many tokens: 39 for a one-digit sum."""


def tokenizer(size: int = SIZES["vocab_size"]) -> PreTrainedTokenizerFast:
    """A token per word of the template and of the questions; all others end in a number, such as ``word40 7``."""
    words = dict.fromkeys([PAD, START, END, NEWLINE, "<unk>", *SYSTEM.split(), "system", "user", "assistant"])
    words |= dict.fromkeys(["What", "is", "+", "?", "Answer", "with", "the", "number", "only", ".", *"0123456789"])
    own = list(words)
    vocabulary = {token: index for index, token in enumerate(own)}
    vocabulary |= {f"word{index} {index % 19}": index for index in range(len(own), size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Sequence([decoders.Replace("word", " word"), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END, NEWLINE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token="<unk>", chat_template=TEMPLATE
    )


def write(folder: Path, **sizes: int) -> None:
    """The model and its tokenizer as a Hugging Face folder; ``sizes`` replace those of SmolLM2-135M."""
    sizes = {**SIZES, **sizes}
    own = tokenizer(sizes["vocab_size"])
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        tie_word_embeddings=True,
        rope_theta=100000,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

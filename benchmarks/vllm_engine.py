"""What our engine adds to vLLM: ``VLLMEngine.generate`` over a bare ``LLM.generate``, side by side on one engine.

    .venv-vllm/bin/python benchmarks/vllm_engine.py                       # the quick start's model, random weights
    .venv-vllm/bin/python benchmarks/vllm_engine.py --policy FOLDER       # any Hugging Face folder

The calls get the same prompts and end in the same vLLM engine, in turns and in changing order; the figure is the median
of the ratios of CPU seconds over pairs of calls. ``bare`` asks for one seeded sample per request, as we must, with the
log-prob of each token; ``bare / bare`` is the same comparison of that call with itself: the noise to read it against.
``n samples per request`` is what one would write without seeds: fewer requests, and no log-probs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, as ours is
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from ibro_lightning.engines import VLLMEngine
from ibro_lightning.models import PretrainedPolicy, Qwen2FromScratch
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import SamplingParams


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="Hugging Face folder; the quick start's model with random weights if left out")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--prompt_tokens", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=56)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--deadline_s", type=float, help="watch a deadline, one that does not strike")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)

    source = (
        PretrainedPolicy(options.policy)
        if options.policy
        else Qwen2FromScratch(NumberPath(), num_heads=3, num_kv_heads=1)
    )
    spec = ModelSpec(source.config(), source.eos_token_ids(), torch.device("cpu"))
    vocabulary = spec.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (options.prompts, options.prompt_tokens), generator=generator).tolist()
    seeds = [[row * options.samples + sample for sample in range(options.samples)] for row in range(options.prompts)]

    llm = bare_llm(spec)
    engine = VLLMEngine(dtype="float32", enforce_eager=True, deadline_s=options.deadline_s)
    with mock.patch("ibro_lightning.engines.vllm.build", return_value=llm.llm_engine):
        engine.setup(spec)
    sampling = SamplingParams(max_tokens=options.max_tokens)

    def ours() -> int:
        groups = engine.generate(prompts, sampling, seeds)
        return sum(len(generation.token_ids) for group in groups for generation in group)

    from vllm import SamplingParams as VLLMSamplingParams

    common = {
        "max_tokens": options.max_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(spec.eos_token_ids),
        "detokenize": False,
    }
    requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(options.samples)]
    one_each = [
        VLLMSamplingParams(seed=seed, logprobs=0, flat_logprobs=True, **common) for own in seeds for seed in own
    ]

    def bare() -> int:
        outputs = llm.generate(requests, one_each, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    many = VLLMSamplingParams(n=options.samples, **common)

    def many_per_request() -> int:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], many, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    assert ours() == bare(), "the same seeds are the same samples"
    print(
        f"{options.prompts} prompts of {options.prompt_tokens} tokens x {options.samples} samples, {ours()} new tokens"
    )
    compare("ours / bare", ours, bare, options.pairs)
    compare("bare / bare", bare, bare, options.pairs)
    compare("ours / n samples per request, per token", ours, many_per_request, options.pairs)
    engine.close()


def bare_llm(spec: ModelSpec) -> object:
    import tempfile

    from vllm import LLM

    folder = tempfile.mkdtemp()
    spec.config.save_pretrained(folder)
    return LLM(
        folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=2**29,
        enable_chunked_prefill=False,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        max_num_seqs=256,
        max_model_len=min(512, spec.config.max_position_embeddings),
    )


def compare(title: str, first: Callable[[], int], second: Callable[[], int], pairs: int) -> None:
    """Print the median ratio of CPU seconds per generated token, and its quartiles."""
    ratios = []
    for pair in range(pairs):
        order = (first, second) if pair % 2 == 0 else (second, first)
        seconds = [cpu_seconds_per_token(call) for call in order]
        ratios.append(seconds[0] / seconds[1] if pair % 2 == 0 else seconds[1] / seconds[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{title}: {middle:.3f} (quartiles {low:.3f} - {high:.3f}, {pairs} pairs)")


def cpu_seconds_per_token(call: Callable[[], int]) -> float:
    start = time.process_time()
    tokens = call()
    return (time.process_time() - start) / tokens


if __name__ == "__main__":
    main()

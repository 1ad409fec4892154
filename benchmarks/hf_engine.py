"""What generation with the embedded engine costs, against transformers' ``generate`` and against what it cannot beat.

    python benchmarks/hf_engine.py --policy FOLDER          # the quick start: 48 x 8 responses of up to 56 tokens
    python benchmarks/hf_engine.py --shape smollm2          # SmolLM2-135M's sizes, random weights: 8 x 8 x 32 tokens
    python benchmarks/hf_engine.py --policy FOLDER --reference SRC   # also the engine of another checkout's src/

All take turns in one process and in changing order, on one thread; the figures are CPU seconds and medians of ratios,
with quartiles. ``generate`` is transformers' own loop, in one batch, with sampling; ``one pass`` scores the same
responses in batches of at most 2,048 padded tokens, sorted by length: every token once, all at the same time, which is
the least that any loop must compute. ``check`` is the check of the weights that follows each sync.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine, weight_check
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.tasks import NumberPath, NumberPathSource
from ibro_lightning.types import SamplingParams

BUDGET = 2048
"""Padded tokens per batch of the pass that scores."""


class Work(NamedTuple):
    """A model and what it is asked for."""

    model: Any
    eos: tuple[int, ...]
    prompts: list[list[int]]
    seeds: list[list[int]]
    sampling: SamplingParams

    def spec(self) -> ModelSpec:
        return ModelSpec(self.model.config, self.eos, torch.device("cpu"))


def quickstart(policy: str) -> Work:
    tokenizer = NumberPath().tokenizer()
    problems = list(NumberPathSource(split="train", min_distance=2, max_distance=8).problems())
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [tokenizer(problems[i].prompt, add_special_tokens=False)["input_ids"] for i in order[:48]]
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    return Work(model, (tokenizer.eos_token_id,), prompts, seeds_of(prompts), SamplingParams(max_tokens=56))


def smollm2() -> Work:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = torch.randint(49152, (8, 39)).tolist()
    never = 49152  # no such token: all responses have 32
    return Work(model, (never,), prompts, seeds_of(prompts), SamplingParams(max_tokens=32))


def seeds_of(prompts: list[list[int]]) -> list[list[int]]:
    return [[1000 * prompt + sample for sample in range(8)] for prompt in range(len(prompts))]


def ready(engine: Any, work: Work) -> Any:
    engine.setup(work.spec())
    engine.load_weights(work.model.state_dict().items())
    return engine


@contextmanager
def engines_of(source: str) -> Iterator[None]:
    """Within, ``ibro_lightning`` is the package of another checkout."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "ibro_lightning"}
    sys.path.insert(0, str(Path(source).resolve()))
    try:
        yield
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "ibro_lightning"]:
            del sys.modules[name]
        sys.modules.update(ours)


def engine_call(engine: Any, work: Work) -> Callable[[], Any]:
    return lambda: engine.generate(work.prompts, work.sampling, work.seeds)


def generate_call(work: Work) -> Callable[[], Any]:
    """Transformers' ``generate``; left padding, one batch, each prompt computed once per response."""
    padded = Sequences.collate(work.prompts, [()] * len(work.prompts), padding_side="left")
    inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 8, "max_new_tokens": work.sampling.max_tokens}
    ends = list(work.eos) if work.eos[0] < work.model.config.vocab_size else None

    @torch.inference_mode()
    def call() -> Any:
        torch.manual_seed(0)
        return work.model.generate(**inputs, **settings, eos_token_id=ends, pad_token_id=0)

    return call


def one_pass_call(work: Work, groups: list[list[Any]]) -> Callable[[], Any]:
    """Scores these responses."""
    policy = Policy(work.model)
    rows = [(prompt, sample.token_ids) for prompt, own in zip(work.prompts, groups, strict=True) for sample in own]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    batches: list[list[Any]] = [[]]
    for row in rows:
        if (len(batches[-1]) + 1) * (len(row[0]) + len(row[1])) > BUDGET:
            batches.append([])
        batches[-1].append(row)
    collated = [Sequences.collate(*zip(*batch, strict=True)) for batch in batches if batch]

    @torch.inference_mode()
    def call() -> Any:
        return [policy(sequences, temperature=1.0, with_entropy=False) for sequences in collated]

    return call


def check_call(engine: Any, work: Work, weight_check: Any = weight_check) -> Callable[[], Any]:
    policy = Policy(work.model)

    @torch.no_grad()
    def response_logp(sequences: Any, temperature: float) -> Any:
        return policy(sequences, temperature=temperature, with_entropy=False)[0]

    provider: Any = SimpleNamespace(
        model_spec=work.spec,
        compute_dtype="float32",
        response_logp=response_logp,
        named_full_weights=policy.named_full_weights,
    )
    verifier = weight_check.WeightVerifier(weight_check.WeightCheck(), engine, provider, 0)
    return lambda: verifier.verify("benchmark")


def compare(calls: dict[str, Callable[[], Any]], turns: int) -> None:
    """Print CPU seconds of each, and their ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    first = seconds[next(iter(calls))]
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles(own, n=4)
        lower, ratio, upper = statistics.quantiles([a / b for a, b in zip(own, first, strict=True)], n=4)
        print(f"{name:18} {middle:8.4f} s ({low:.4f} - {high:.4f})   {ratio:.3f} ({lower:.3f} - {upper:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["quickstart", "smollm2"], default="quickstart")
    parser.add_argument("--policy", help="folder of the quick start's base policy")
    parser.add_argument("--reference", help="src/ of another checkout, whose engine is the first of the comparison")
    parser.add_argument("--reference_rows", type=int, default=256, help="its max_batch_size")
    parser.add_argument("--max_batch_size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    if options.shape == "quickstart" and not options.policy:
        parser.error("--policy: the quick start needs its base policy (make quickstart trains one)")
    torch.set_num_threads(1)
    work = quickstart(options.policy) if options.shape == "quickstart" else smollm2()
    calls: dict[str, Callable[[], Any]] = {}
    if options.reference:
        with engines_of(options.reference):
            other = ready(importlib.import_module("ibro_lightning.engines").HFEngine(options.reference_rows), work)
            theirs = importlib.import_module("ibro_lightning.engines.weight_check")
        calls["reference"] = engine_call(other, work)
        calls["reference's check"] = check_call(other, work, theirs)
    engine = ready(HFEngine(options.max_batch_size), work)
    calls["HFEngine"] = engine_call(engine, work)
    groups = engine.generate(work.prompts, work.sampling, work.seeds)
    calls["generate"] = generate_call(work)
    calls["one pass"] = one_pass_call(work, groups)
    calls["check"] = check_call(engine, work)
    lengths = [len(sample.token_ids) for own in groups for sample in own]
    print(f"{len(lengths)} responses of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    if options.reference:
        expected = [sample for own in calls["reference"]() for sample in own]
        pairs = list(zip(expected, [sample for own in groups for sample in own], strict=True))
        same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
        largest = max(abs(x - y) for a, b in same for x, y in zip(a.logp, b.logp, strict=True))
        print(f"{len(same)} the same as the reference's, their log-probs up to {largest:.1e} nats apart")
    compare(calls, options.turns)


if __name__ == "__main__":
    main()

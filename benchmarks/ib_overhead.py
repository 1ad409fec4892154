"""What IB regularisation costs: an update step with it over one without, side by side in one process.

    python benchmarks/ib_overhead.py                    # the quick start's model
    python benchmarks/ib_overhead.py --shape head       # SmolLM2's output layer alone, with its entropy and without
    python benchmarks/ib_overhead.py --shape smollm2    # SmolLM2-135M's shapes (49,152 x 576), random weights

A step is what ``Updater.update`` does with one mini-batch: forward, loss and backward of every micro-batch,
gradient clipping, AdamW. Steps with and without alternate, in changing order; the figure is the median of the ratios of
CPU seconds, and beside it the ratio of the fastest steps, which noise can only slow. ``none / none`` is the same
comparison of the method with itself: the noise to read the others against.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.functional import linear_logprob_entropy
from ibro_lightning.models import PolicyOptions, PolicySource, Qwen2FromScratch
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import EntropyBonus, InformationBottleneck, NoRegularizer
from ibro_lightning.tasks import NumberPath


class SmolLM2Shapes(PolicySource):
    """SmolLM2-135M, untrained."""

    def tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    def config(self) -> Any:
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
        )

    def build(self, options: PolicyOptions) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config())


SHAPES = {  # source, responses, prompt and response tokens, tokens per micro-batch
    "quickstart": (lambda: Qwen2FromScratch(NumberPath()), 192, 4, 24, 2048),
    "smollm2": (SmolLM2Shapes, 8, 32, 96, 1024),
}


METHODS = {"none": NoRegularizer, "IB": InformationBottleneck, "naive": EntropyBonus}


def experience_of(module: DAPOModule, responses: int, prompt_tokens: int, response_tokens: int) -> Experience:
    generator = torch.Generator().manual_seed(0)
    vocabulary = module.policy_source.config().vocab_size
    tokens = torch.randint(vocabulary, (responses, prompt_tokens + response_tokens), generator=generator)
    sequences = Sequences.collate(tokens[:, :prompt_tokens].tolist(), tokens[:, prompt_tokens:].tolist())
    logp, entropy = module.scorer.score(sequences, 1.0)
    advantages = torch.randn(responses, 1, generator=generator).expand(logp.shape)
    groups = torch.arange(responses) // 8
    return Experience(sequences, logp, entropy, advantages, sequences.response_mask, groups, 1.0)


def step(module: DAPOModule, optimizer: torch.optim.Optimizer, experience: Experience) -> float:
    """CPU seconds of one update."""
    start = time.process_time()
    loss_of, context = module.policy_loss, module.context()
    prepared = loss_of.prepare(experience, context)
    for rows, _ in module.scorer.budget.micro_batches(prepared.sequences, network=module.policy):
        micro = prepared.select(rows)
        loss, _ = loss_of(loss_of.stats(micro, context), micro)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(module.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def head_ratios(repeats: int) -> list[float]:
    """CPU seconds of the output layer, forward and backward, with the entropy over those without."""
    config, generator = SmolLM2Shapes().config(), torch.Generator().manual_seed(0)
    hidden = torch.randn(768, config.hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 3 / config.hidden_size**0.5
    weight.requires_grad_()
    targets = torch.randint(config.vocab_size, (768,), generator=generator)

    def seconds(with_entropy: bool) -> float:
        start = time.process_time()
        logp, entropy = linear_logprob_entropy(hidden, weight, targets, with_entropy=with_entropy)
        loss = logp.sum() if entropy is None else (logp + entropy).sum()
        torch.autograd.grad(loss, (hidden, weight))
        return time.process_time() - start

    seconds(True)
    turns = [{kind: seconds(kind) for kind in (True, False)[:: 1 if i % 2 else -1]} for i in range(repeats)]
    return [turn[True] / turn[False] for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "head"], default="quickstart")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=None, help="pairs of steps per method")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.shape == "head":
        low, middle, high = statistics.quantiles(head_ratios(arguments.repeats or 15), n=4)
        print(f"head: with entropy / without  {middle:.3f}  (quartiles {low:.3f} to {high:.3f})")
        return
    source, responses, prompt_tokens, response_tokens, budget = SHAPES[arguments.shape]
    module = DAPOModule(source(), micro_batch_tokens=budget)
    module.configure_model()
    experience = experience_of(module, responses, prompt_tokens, response_tokens)
    optimizer = torch.optim.AdamW(module.policy.parameters(), lr=1e-6)
    repeats = arguments.repeats or {"quickstart": 40, "smollm2": 5}[arguments.shape]
    step(module, optimizer, experience)
    for name in arguments.methods:
        regularizer = METHODS[name]()
        seconds_of: dict[bool, list[float]] = {True: [], False: []}
        for repeat in range(repeats):
            for method in (NoRegularizer(), regularizer)[:: 1 if repeat % 2 else -1]:
                module.regularizer = method
                seconds_of[method is regularizer].append(step(module, optimizer, experience))
        ratios = [a / b for a, b in zip(seconds_of[True], seconds_of[False], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        fastest = min(seconds_of[True]) / min(seconds_of[False])
        print(
            f"{arguments.shape}: {name} / none  {statistics.median(ratios):.3f}  (quartiles {low:.3f} to {high:.3f}; "
            f"fastest over fastest {fastest:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

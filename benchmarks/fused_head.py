"""Time, memory and gradient error of ``linear_logprob_entropy``; see README.md.

    python benchmarks/fused_head.py [--bf16] [--n 2048 --d 512 --v 32000] [--chunk_size ROWS] [--repeats 7]
    python benchmarks/fused_head.py --functionals [--before COMMIT] …

The first compares with full logits and with the bare products; the second with the head of another commit, which it
loads beside ours, and shows what functionals cost.

Processor time of one thread. The variants take turns in one process, each turn beginning with another one, and each
ratio is of two times in the same turn, so that what else the machine does falls on all of them; medians and quartiles.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.functional import Collision, HeadFunctional, KLToHead, Margin, RestrictedEntropy, TokenProbability
from ibro_lightning.functional.fused_head import linear_head, linear_logprob_entropy
from ibro_lightning.functional.logprobs import logprob_and_entropy

MIB = 1 << 20
WITHOUT_FUNCTIONALS = "94cdc23~1"
"""The commit before the head had functionals."""


class Problem:
    """Inputs of the size asked for, and a gradient for each of the two outputs."""

    def __init__(
        self, n: int, d: int, v: int, dtype: torch.dtype, chunk_size: int | None, device: torch.device | str = "cpu"
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, d, generator=draw).to(device, dtype).requires_grad_()
        # Logits with a standard deviation of 3: distributions of some nats, as a trained model has.
        self.weight = (torch.randn(v, d, generator=draw) * 3 / d**0.5).to(device, dtype).requires_grad_()
        self.targets = torch.randint(v, (n,), generator=draw).to(device)
        self.upstream = torch.randn(n, generator=draw).to(device), torch.randn(n, generator=draw).to(device)
        self.chunk_size = chunk_size
        # Another head of the same sizes and dtype, for KL divergences.
        self.other = [torch.randn(len(x), d, generator=draw).to(device, dtype) for x in (self.hidden, self.weight)]
        self.other[1] *= 3 / d**0.5
        # Made beforehand, so that the bare products are charged with no allocation.
        self.logits, self.out = (
            torch.zeros(n, v, dtype=dtype, device=device),
            [torch.zeros_like(x) for x in (self.hidden, self.weight)],
        )

    def fused(self) -> list[Tensor]:
        return self.with_gradients(
            linear_logprob_entropy(self.hidden, self.weight, self.targets, chunk_size=self.chunk_size)
        )

    def fused_by(self, module: ModuleType) -> list[Tensor]:
        """By another version of the head."""
        return self.with_gradients(
            module.linear_logprob_entropy(self.hidden, self.weight, self.targets, chunk_size=self.chunk_size)
        )

    def functionals(self) -> dict[str, dict[str, HeadFunctional]]:
        """The functionals of each row of the table, made anew: a KL keeps what it has converted."""
        top_p, end = RestrictedEntropy(top_p=0.8), TokenProbability([2])
        return {
            "top-p 0.8 entropy": {"entropy": top_p},
            "top 70 % entropy": {"entropy": RestrictedEntropy(top_fraction=0.7)},
            "P(EOS)": {"end": end},
            "top-p entropy and P(EOS)": {"entropy": top_p, "end": end},
            "collision": {"collision": Collision()},
            "margin": {"margin": Margin()},
            "KL to another head": {"kl": KLToHead(*self.other)},
            "KL, forward": {"kl": KLToHead(*self.other, reverse=False)},
        }

    def with_functionals(self, row: str) -> list[Tensor]:
        """With functionals, and gradients arriving for them too."""
        logp, entropy, values = linear_head(
            self.hidden, self.weight, self.targets, self.functionals()[row], chunk_size=self.chunk_size
        )
        return self.with_gradients((logp, entropy, *values.values()))

    def naive(self) -> list[Tensor]:
        return self.with_gradients(logprob_and_entropy(self.hidden @ self.weight.T, self.targets))

    def with_gradients(self, outputs: tuple[Any, ...]) -> list[Tensor]:
        upstream = [self.upstream[number % 2] for number in range(len(outputs))]
        gradients = torch.autograd.grad(outputs, (self.hidden, self.weight), upstream)
        return [*(x.detach() for x in outputs), *gradients]

    @torch.no_grad()
    def products(self, rows: int | None = None) -> None:
        """What any implementation that recomputes the logits has to multiply."""
        n = len(self.hidden)
        for first in range(0, n, rows or n):
            h = self.hidden[first : first + (rows or n)]
            logits = self.logits[: len(h)]
            for _ in range(2):
                torch.mm(h, self.weight.T, out=logits)
            torch.mm(logits, self.weight, out=self.out[0][: len(h)])
            torch.addmm(self.out[1], logits.T, h, beta=float(first > 0), out=self.out[1])

    def exact(self) -> list[Any]:
        """Outputs and gradients in float64 by the naive formula, on a few rows at a time for the sake of memory."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        outputs: list[Any] = []
        for rows in torch.arange(len(hidden)).split(256):
            outputs.append(logprob_and_entropy(hidden[rows] @ weight.T, self.targets[rows]))
            torch.autograd.backward(outputs[-1], [g[rows].double() for g in self.upstream])
        return [*(torch.cat(column).detach() for column in zip(*outputs, strict=True)), hidden.grad, weight.grad]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's allocator had out at a time, above what it had before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turns(variants: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each turn."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = cpu_seconds(variants[name])
            if turn:  # The first one warms up.
                seconds[name].append(taken)
    return seconds


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"


def head_of(commit: str) -> ModuleType:
    """The head as ``commit`` has it; what it imports of the package is today's."""
    path = "src/ibro_lightning/functional/fused_head.py"
    root = Path(__file__).parent.parent
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=root, capture_output=True, text=True, check=True)
    module = ModuleType(f"fused_head_{commit}")
    exec(compile(shown.stdout, f"{commit}:{path}", "exec"), vars(module))
    return module


def show_functionals(problem: Problem, commit: str, turns: int) -> None:
    """Time and memory of the plain head beside that of ``commit``, in three times as many turns, and of functionals."""
    before = head_of(commit)
    plain: dict[str, Callable[[], object]] = {"plain": problem.fused, "before": lambda: problem.fused_by(before)}
    alike = all(map(torch.equal, problem.fused(), problem.fused_by(before)))
    bytes_of = {name: peak_bytes(run) - problem.weight.nbytes for name, run in plain.items()}
    ours, theirs = in_turns(plain, 3 * turns).values()
    ratio = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    print(f"plain head / that of {commit}: time {ratio}, memory {bytes_of['plain'] / bytes_of['before']:.3f}", end="")
    print(f", outputs and gradients {'the same bit for bit' if alike else 'NOT the same'}")

    variants: dict[str, Callable[[], object]] = {"plain": problem.fused}
    variants |= {row: functools.partial(problem.with_functionals, row) for row in problem.functionals()}
    seconds = in_turns(variants, turns)
    peaks = {name: peak_bytes(run) - problem.weight.nbytes for name, run in variants.items()}
    full = peak_bytes(problem.naive) - problem.weight.nbytes
    print(f"{'':26}{'CPU s':>7}{'/ plain':>24}{'peak MiB':>10}{'/ full logits':>15}")
    for name, own in seconds.items():
        over = quartiles([a / b for a, b in zip(own, seconds["plain"], strict=True)])
        print(f"{name:26}{statistics.median(own):7.2f}{over:>24}{peaks[name] / MIB:10.0f}{peaks[name] / full:15.3f}")


def error_sizes(got: list[Tensor], exact: list[Any]) -> dict[str, float]:
    """Of the outputs, the largest error in nats; of the gradients, its norm and its largest entry, relative to those of
    the exact gradient."""
    logp, entropy, *gradients = [x.double() - y for x, y in zip(got, exact, strict=True)]
    sizes = {"logp_error": float(logp.abs().max()), "entropy_error": float(entropy.abs().max())}
    for name, error, right in zip(("hidden", "weight"), gradients, exact[2:], strict=True):
        sizes[f"d_{name}_error_norm"] = float(error.norm() / right.norm())
        sizes[f"d_{name}_error_max"] = float(error.abs().max() / right.abs().max())
    return sizes


def errors(got: list[Tensor], exact: list[Any]) -> str:
    logp, entropy, *gradients = error_sizes(got, exact).values()
    relative = [f"{norm:.1e} / {largest:.1e}" for norm, largest in zip(gradients[::2], gradients[1::2], strict=True)]
    return f"{logp:9.1e} {entropy:9.1e}   {relative[0]}   {relative[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2048, help="rows: tokens")
    parser.add_argument("--d", type=int, default=512, help="width of the hidden states")
    parser.add_argument("--v", type=int, default=32000, help="vocabulary")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 inputs, instead of float32")
    parser.add_argument("--chunk_size", type=int, help="rows of logits at a time; by default the function's own choice")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--functionals", action="store_true", help="what functionals cost, and the head without them")
    parser.add_argument("--before", default=WITHOUT_FUNCTIONALS, help="the commit whose head is compared then")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(args.n, args.d, args.v, torch.bfloat16 if args.bf16 else torch.float32, args.chunk_size)
    print(f"N={args.n} D={args.d} V={args.v} {problem.hidden.dtype}, torch {torch.__version__}")
    if args.functionals:
        show_functionals(problem, args.before, args.repeats)
        return

    variants: dict[str, Callable[[], object]] = {
        "fused": problem.fused,
        "naive": problem.naive,
        "four products": problem.products,
        "four products, 256 rows": lambda: problem.products(256),
    }
    seconds = in_turns(variants, args.repeats)
    # The gradient of the weights is there whatever is done, and not counted.
    peaks = {name: peak_bytes(variants[name]) - problem.weight.nbytes for name in ("fused", "naive")}
    print(f"{'':25}{'CPU s':>8}{'/ products':>12}{'/ naive':>9}{'peak MiB':>10}{'/ naive':>9}")
    for name, own in seconds.items():
        ratios = [
            statistics.median(a / b for a, b in zip(own, seconds[of], strict=True)) for of in ("four products", "naive")
        ]
        memory = f"{peaks[name] / MIB:10.0f}{peaks[name] / peaks['naive']:9.3f}" if name in peaks else ""
        print(f"{name:25}{statistics.median(own):8.2f}{ratios[0]:12.2f}{ratios[1]:9.2f}{memory}")

    exact = problem.exact()
    print("error against float64       logp   entropy   hidden's gradient   weight's gradient  (norm / largest)")
    for name, run in (("fused", problem.fused), ("naive", problem.naive)):
        print(f"{name:22}{errors(run(), exact)}")


if __name__ == "__main__":
    main()

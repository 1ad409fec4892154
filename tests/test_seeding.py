"""Seeds decide every sample of a run: distinct, exactly reproducible, and apart from torch's own generator."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from ibro_lightning.seeding import counter_normals, counter_uniforms, derive_seed, permutation, run_seed

torch.set_num_threads(1)
MASK = 2**64 - 1


def splitmix64(seed: int, counter: int) -> int:
    """Draw number ``counter`` of SplitMix64 as its authors publish it, in Python's unbounded integers."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chi_square(values: torch.Tensor, buckets: int) -> float:
    """Pearson's statistic of ``values`` in [0, 1) against equal shares per bucket."""
    counts = torch.bincount((values * buckets).long(), minlength=buckets).double()
    expected = len(values) / buckets
    return ((counts - expected) ** 2 / expected).sum().item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


class TestDeriveSeed:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ((1, 23), (12, 3)),
            ((1, 23), (123,)),
            ((1, 23), ("1", 23)),
            ((1, 23), (23, 1)),
            (("ab", "c"), ("a", "bc")),
            (("ab", ""), ("ab",)),
            (("", "ab"), ("ab", "")),
            ((1,), (True,)),
            ((0,), ()),
            ((-1,), (1,)),
        ],
    )
    def test_counters_that_differ_in_value_type_order_or_boundary_give_other_seeds(self, one, other):
        assert derive_seed(0, *one) != derive_seed(0, *other)

    def test_a_counter_cannot_imitate_the_boundary_between_two_counters(self):
        """Prompt ids come from users' files and may hold any character."""
        assert derive_seed(0, "a\x1fint:3") != derive_seed(0, "a", 3)

    def test_the_runs_seed_matters(self):
        assert derive_seed(0, "train", 1) != derive_seed(1, "train", 1)

    def test_seeds_use_63_bits_and_no_more(self):
        """torch.Generator and int64 tensors take non-negative seeds; fewer bits would bring birthday collisions."""
        seeds = [derive_seed(0, "sample", i) for i in range(2000)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        for bit in range(63):
            ones = sum(seed >> bit & 1 for seed in seeds)
            assert abs(ones - 1000) < 5 * math.sqrt(500), f"bit {bit} is set in {ones} of 2000 seeds"

    def test_no_collisions_over_a_run(self):
        seeds = {derive_seed(7, "train", i, p, s) for i in range(10) for p in range(100) for s in range(16)}
        assert len(seeds) == 10 * 100 * 16

    def test_the_same_in_every_process(self):
        """Python's own hash() changes with PYTHONHASHSEED, which would break resuming and every second rank."""
        code = "from ibro_lightning.seeding import derive_seed; print(derive_seed(3, 'walk', 5, 'x'))"
        env = {**os.environ, "PYTHONHASHSEED": "12345"}
        output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert int(output.stdout) == derive_seed(3, "walk", 5, "x")

    def test_run_seed_is_what_lightning_recorded(self, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "42")
        assert run_seed() == 42
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert run_seed() == 0


class TestCounterUniforms:
    @pytest.mark.parametrize("counter", [0, 1, 2, 1023, 10**6, 2**40])
    def test_equal_to_splitmix64(self, counter):
        """All 64 bits matter: a wrong shift or an overflow shows in some of these seeds."""
        seeds = [0, 1, 2**31, 2**62 + 12345, 2**63 - 1, *(derive_seed(1, "check", i) for i in range(200))]
        draws = counter_uniforms(torch.tensor(seeds), counter)
        assert draws.dtype == torch.float64
        assert draws.tolist() == [(splitmix64(seed, counter) >> 12) / 2**52 for seed in seeds]

    def test_the_reference_is_splitmix64(self):
        """First outputs for seed 1234567, as published with the reference C code (Vigna's splitmix64.c)."""
        assert splitmix64(1234567, 0) == 6457827717110365317
        assert splitmix64(1234567, 1) == 3203168211198807973

    def test_at_least_0_and_below_1(self):
        draws = counter_uniforms(torch.arange(100_000), 3)
        assert draws.min() >= 0
        assert draws.max() < 1

    def test_uniform_over_seeds(self):
        """Consecutive seeds are the hardest case for a hash. 63 degrees of freedom: 103.4 is exceeded once in 1000."""
        assert chi_square(counter_uniforms(torch.arange(100_000), 0), 64) < 103.4

    def test_uniform_over_counters(self):
        draws = torch.cat([counter_uniforms(torch.tensor([99]), step) for step in range(20_000)])
        assert chi_square(draws, 64) < 103.4

    @pytest.mark.parametrize("distance", [1, 2, 7])
    def test_independent_over_counters_and_over_seeds(self, distance):
        """A token's draw must say nothing about the next one's, nor about that of a neighbouring sample."""
        seeds = torch.arange(50_000)
        draws, later = counter_uniforms(seeds, 0), counter_uniforms(seeds, distance)
        bound = 4 / math.sqrt(len(seeds))
        assert abs(correlation(draws, later)) < bound
        assert abs(correlation(draws[:-distance], draws[distance:])) < bound
        # Correlation sees lines only; pairs in an 8 x 8 grid see more.
        pairs = ((draws * 8).long() * 8 + (later * 8).long() + 0.5) / 64
        assert chi_square(pairs, 64) < 103.4

    def test_a_draw_depends_on_its_own_seed_only(self):
        together = counter_uniforms(torch.tensor([5, 6, 7]), 4)
        assert together[1] == counter_uniforms(torch.tensor([6]), 4)[0]


class TestPermutation:
    @pytest.mark.parametrize("size", [1, 2, 17, 1000])
    def test_holds_every_index_once(self, size):
        assert sorted(permutation(size, derive_seed(0, "order", size))) == list(range(size))

    def test_a_function_of_the_seed(self):
        assert permutation(100, 2**63 - 1) == permutation(100, 2**63 - 1)
        assert permutation(100, 1) != permutation(100, 2)
        assert permutation(100, 1) != list(range(100))

    def test_every_order_is_equally_likely(self):
        """6 orders of 3, 5 degrees of freedom: 20.52 is exceeded once in 1000."""
        orders = [tuple(permutation(3, derive_seed(0, "order", i))) for i in range(3000)]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == 6
        assert sum((count - 500) ** 2 / 500 for count in counts) < 20.52

    def test_leaves_the_global_generator_untouched_and_ignores_it(self):
        """The prompts' order must not depend on, or disturb, what else a run draws from torch."""
        torch.manual_seed(1)
        before = torch.get_rng_state()
        order = permutation(50, 3)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert permutation(50, 3) == order


class TestCounterNormals:
    def test_a_draw_is_box_and_mullers_of_two_uniform_ones(self) -> None:
        seeds = torch.tensor([0, 1, -5, 2**62])
        for counter in (0, 3):
            one, two = (counter_uniforms(seeds, 2 * counter + n).tolist() for n in (0, 1))
            expected = [
                math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v) for u, v in zip(one, two, strict=True)
            ]
            assert counter_normals(seeds, counter).tolist() == pytest.approx(expected, rel=1e-12)
        counters = torch.tensor([4, 0, 2, 9])
        each = [counter_normals(seeds[n, None], int(counter)).item() for n, counter in enumerate(counters)]
        assert counter_normals(seeds, counters).tolist() == each

    def test_draws_are_normal_and_those_of_one_seed_independent(self) -> None:
        seeds = torch.tensor([derive_seed(0, n) for n in range(20_000)])
        first, second = counter_normals(seeds, 0), counter_normals(seeds, 1)
        for draws in (first, second):
            assert abs(draws.mean().item()) < 4 / math.sqrt(20_000)
            assert draws.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 20_000))
            normal = 0.5 * (1 + torch.erf(draws / math.sqrt(2)))
            assert chi_square(normal.clamp(max=1 - 1e-12), 50) < 100  # 49 ± 10
        assert abs(correlation(first, second)) < 4 / math.sqrt(20_000)
        assert abs(correlation(first.square(), second.square())) < 4 / math.sqrt(20_000)

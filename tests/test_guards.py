"""Guards of a long run: numbers that are not finite, memory that runs out, iterations that take too long."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.processes import run_ranks
from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import FlatSequences, Sequences
from ibro_lightning.errors import ConfigError, is_out_of_memory
from ibro_lightning.guards.memory_advice import (
    OutOfMemory,
    engine_memory_advice,
    lower_by,
    memory_advice,
    requested_bytes,
)
from ibro_lightning.ranks import ALONE
from ibro_lightning.update.nonfinite import NonFiniteError, NonFiniteGuard, advantages_are_finite, nonfinite_cause

# Numbers that are not finite.


def step(advantages: list[list[float]], mask: list[list[bool]]) -> Experience:
    sequences = FlatSequences.collate([[1, 2]] * len(mask), [[3] * len(row) for row in mask])
    values = torch.tensor(advantages).flatten()
    return Experience(
        sequences=sequences,
        old_logp=torch.zeros_like(values),
        old_entropy=torch.zeros_like(values),
        advantages=values,
        mask=torch.tensor(mask).flatten(),
        groups=torch.zeros(len(mask), dtype=torch.long),
        temperature=1.0,
        extra={"values": values + 1},
    )


class TestNonFinite:
    @given(st.lists(st.booleans(), max_size=30), st.integers(1, 6))
    def test_training_stops_after_so_many_steps_in_a_row_and_not_before(self, finite, limit):
        guard = NonFiniteGuard(limit)
        for well in finite:
            guard.record("policy", None if well else "gradient")
        longest = max((len(run) for run in "".join("01"[not well] for well in finite).split("0")), default=0)
        assert (guard._offender is not None) == (longest >= limit)
        assert len(guard.causes) == finite.count(False)

    def test_networks_are_counted_apart(self):
        guard = NonFiniteGuard(2)
        for _ in range(2):
            guard.record("critic", None)
            guard.record("policy", "loss")
        assert guard.in_a_row == {"critic": 0, "policy": 2}

    def test_a_resumed_run_counts_on(self):
        guard, resumed = NonFiniteGuard(3), NonFiniteGuard(3)
        guard.record("policy", "loss")
        resumed.load_state_dict(guard.state_dict())
        resumed.record("policy", "loss")
        assert resumed.in_a_row == {"policy": 2}

    def test_the_batch_is_saved_and_named(self, tmp_path):
        guard = NonFiniteGuard(1)
        offender = step([[1.0, math.nan]], [[True, True]])
        guard.record("policy", "advantage", offender)
        with pytest.raises(NonFiniteError) as caught:
            guard.check(tmp_path, iteration=12, rank=1)
        path = tmp_path / "nonfinite" / "iteration_000012_rank_1.pt"
        assert str(path) in str(caught.value)
        assert "the advantage is not finite" in str(caught.value)
        saved = torch.load(path, weights_only=True)
        assert (saved["network"], saved["cause"], saved["iteration"]) == ("policy", "advantage", 12)
        assert torch.equal(saved["sequences.prompts"], offender.sequences.prompts)
        assert torch.equal(saved["sequences.responses"], offender.sequences.responses)
        assert torch.equal(saved["advantages"].isnan(), offender.advantages.isnan())
        assert torch.equal(saved["extra.values"].isnan(), offender.extra["values"].isnan())

    def test_without_a_limit_it_only_counts(self, tmp_path):
        guard = NonFiniteGuard(0)
        for _ in range(10):
            guard.record("policy", "loss")
        guard.check(tmp_path, iteration=1)
        assert guard.in_a_row == {"policy": 10}
        assert not list(tmp_path.iterdir())

    def test_a_new_iteration_begins_with_no_causes(self):
        guard = NonFiniteGuard(2)
        guard.record("policy", "loss")
        guard.start_iteration()
        assert guard.causes == []
        assert guard.in_a_row == {"policy": 1}

    def test_a_negative_limit_is_refused(self):
        with pytest.raises(ConfigError, match=r"^max_nonfinite_steps: -1 - write 0 or more"):
            NonFiniteGuard(-1)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_advantages_count_where_they_take_part_in_the_loss(self, value):
        assert not advantages_are_finite(step([[1.0, value]], [[True, True]]), ALONE)
        assert advantages_are_finite(step([[1.0, value]], [[True, False]]), ALONE)

    def test_the_cause_is_the_first_thing_that_is_not_finite(self):
        bad, good = torch.tensor(math.nan), torch.tensor(1.0)
        assert nonfinite_cause(bad, {"loss": math.inf}) == "loss"
        assert nonfinite_cause(good, {"loss": math.nan}) == "loss"
        assert nonfinite_cause(bad, {"loss": 0.0}) == "gradient"
        assert nonfinite_cause(good, {"loss": 0.0}) is None


# Memory.

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)
CPU = "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"


class TestMemory:
    def load(self, rows: int = 12, length: int = 1365) -> Sequences:
        return Sequences.collate([[1, 2]] * rows, [[3] * (length - 2)] * rows)

    @pytest.mark.parametrize(("packing", "tokens"), [(False, 20), (True, 14)])
    def test_the_size_of_a_micro_batch_includes_padding_unless_it_is_packed(self, packing, tokens):
        sequences = Sequences.collate([[1, 2]] * 2, [[3] * 8, [3] * 2])
        size = rf"a micro-batch of 2 rows of up to 10 tokens \({tokens} in memory\)"
        with pytest.raises(OutOfMemory, match=size), memory_advice("update", sequences, 100, packing=packing):
            raise MemoryError

    def test_the_error_names_the_setting_and_a_smaller_value(self):
        error = torch.OutOfMemoryError(CUDA)
        with pytest.raises(OutOfMemory) as caught, memory_advice("update", self.load(), 16384, checkpointing=False):
            raise error
        said = str(caught.value)
        assert said.startswith("micro_batch_tokens: 16384 - out of memory in update: a micro-batch of 12 rows")
        assert "1365 tokens (16380 in memory) asked for 2.5 GiB more" in said
        assert "write 7936 (÷ 2.06)" in said
        assert "model.policy_options.gradient_checkpointing: true" in said
        assert "\n" not in said
        assert caught.value.__cause__ is error
        assert isinstance(caught.value, ConfigError), "the command line prints it in one line"

    def test_a_batch_far_below_the_budget_is_what_is_halved(self):
        load = self.load(rows=4, length=256)
        with pytest.raises(OutOfMemory, match=r"write 512 \(÷ 1953\)"), memory_advice("update", load, 10**6):
            raise MemoryError

    def test_one_response_that_does_not_fit_needs_another_remedy(self):
        with pytest.raises(OutOfMemory) as caught, memory_advice("update", self.load(1), 1024, checkpointing=True):
            raise RuntimeError(CPU)
        said = str(caught.value)
        assert "divide data.sampling.max_tokens by 2" in said
        assert "fsdp2" in said
        assert "write" not in said
        assert "gradient_checkpointing" not in said

    def test_generation_has_a_setting_of_its_own(self):
        with pytest.raises(OutOfMemory) as caught, engine_memory_advice("data.engine.max_batch_size", 256, 192, 1024):
            raise torch.OutOfMemoryError(CUDA)
        assert "192 responses of up to 1024 tokens asked for 2.5 GiB more: write 96 (÷ 2.67)" in str(caught.value)

    @pytest.mark.parametrize("error", [ValueError("oops"), RuntimeError("shapes do not match"), KeyboardInterrupt()])
    def test_other_errors_pass_as_they_are(self, error):
        with pytest.raises(type(error)) as caught, memory_advice("update", self.load(), 16384, checkpointing=False):
            raise error
        assert caught.value is error

    def test_what_torch_says(self):
        assert requested_bytes(RuntimeError(CUDA)) == int(2.5 * 2**30)
        assert requested_bytes(RuntimeError(CPU)) == 4096
        assert requested_bytes(MemoryError()) is None
        assert is_out_of_memory(MemoryError())
        assert is_out_of_memory(RuntimeError(CPU))
        assert not is_out_of_memory(ValueError(CPU))

    @given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
    def test_the_factor_is_two_or_what_was_measured(self, before, more, asked, room):
        factor = lower_by(before, before + more, asked, before + room)
        assert factor >= 2
        if room and factor > 2:
            assert (more + asked) / factor <= room * (1 + 1e-9), "a micro-batch so much smaller would have fitted"

    def test_an_allocation_that_really_fails(self, tmp_path):
        """In a process that may have little memory: the error is torch's own, and so is what it says."""
        code = """
import resource, torch
from ibro_lightning.guards.memory_advice import memory_advice
from ibro_lightning.batches.sequences import Sequences
batch = Sequences.collate([[1]] * 8, [[2] * 1023] * 8)
torch.set_num_threads(1)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, -1))
held = torch.zeros(2**26)
with memory_advice("update", batch, 16384):
    held = [torch.zeros(2**24), torch.zeros(2**31)]
"""
        assert run_ranks(1, exec, code, folder=tmp_path) == [1]
        said = (tmp_path / "rank_0.log").read_text().splitlines()[-1]
        assert "OutOfMemory: micro_batch_tokens: 16384 - out of memory in update" in said
        assert "asked for 8.0 GiB more" in said
        assert "in use on cpu" in said
        smaller = int(said.split("write ")[1].split()[0])
        assert 1 <= smaller < 8192 / 16, "it asked for more than 16 times of what there was"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_neither_a_norm_nor_a_loss_may_be_infinite(value):
    assert nonfinite_cause(torch.tensor(value), {"loss": 0.0}) == "gradient"
    assert nonfinite_cause(torch.tensor(1.0), {"loss": 0.0, "critic/loss": value}) == "loss"

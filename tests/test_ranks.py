"""What the processes of a run agree on: three of them, with gloo, on the CPU."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from helpers.sharded import on_ranks
from ibro_lightning.errors import RankError
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.ranks import ALONE, Ranks

torch.set_num_threads(1)
SIZE = 3


class Strategy:
    """As much of a Lightning strategy as ranks ask for."""

    def __init__(self, world_size: int, mesh: Any = None) -> None:
        self.world_size, self._device_mesh = world_size, mesh


def items_of(rng: random.Random) -> list[Any]:
    return [
        rng.choice([rng.random(), "é" * rng.randrange(5), None, [rng.randrange(9)]]) for _ in range(rng.randrange(9))
    ]


def check_objects(ranks: Ranks) -> None:
    """Whatever each rank has, all get all of it in order, and parcels reach whom they are for. All ranks draw the same
    random numbers, so each knows what the others have."""
    for seed in range(20):
        rng = random.Random(seed)
        everything = [items_of(rng) for _ in range(SIZE)]
        assert ranks.gather(everything[ranks.rank]) == everything
        parcels = [[items_of(rng) for _ in range(SIZE)] for _ in range(SIZE)]
        assert ranks.all_to_all(parcels[ranks.rank]) == [row[ranks.rank] for row in parcels]
        flags = [rng.random() < 0.2 for _ in range(SIZE)]
        assert ranks.any(flags[ranks.rank]) == any(flags)
        shared = items_of(rng)
        shares = ranks.gather(ranks.share(shared))
        rebuilt = [shares[place % SIZE][place // SIZE] for place in range(len(shared))]
        assert rebuilt == shared
        assert sum(map(len, shares)) == len(shared)
        assert ranks.join(ranks.share(shared)) == shared
        assert ranks.broadcast(everything[ranks.rank]) == everything[0]


def check_numbers(ranks: Ranks) -> None:
    for seed in range(10):
        values = torch.randn(SIZE, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mine = values[ranks.rank].clone()
        assert torch.equal(ranks.max(mine), values.amax(0))
        assert torch.allclose(ranks.sum(mine), values.sum(0), rtol=0, atol=1e-14)
        assert torch.equal(mine, values[ranks.rank]), "the argument is left as it is"
        weights = values.abs() * (values > 0)
        mean = (values * weights).sum() / weights.sum()
        assert torch.allclose(ranks.mean(mine, weights[ranks.rank]), mean, rtol=0, atol=1e-14)
        assert ranks.mean(mine, torch.zeros_like(mine)) == 0.0
        mask = values > 1.5  # on some ranks none
        largest = values[mask].max() if mask.any() else torch.tensor(-torch.inf)
        assert ranks.largest(mine, mask[ranks.rank]) == largest
        assert ranks.largest(mine[:0], mask[ranks.rank][:0]) == -torch.inf


def check_choices(ranks: Ranks) -> None:
    """The largest of all ranks' values: those that one process would choose that has all of them."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        # Few distinct values, so that there are ties; a rank may have none at all.
        sizes = torch.randint(0, 7, (SIZE,), generator=generator).tolist()
        values = [torch.randint(0, 5, (size,), generator=generator).double() for size in sizes]
        everything = torch.cat(values)
        for count in (0, 1, 4, 30):
            chosen = ranks.gather(values[ranks.rank][ranks.top(values[ranks.rank], count)].tolist())
            largest = everything.topk(min(count, len(everything))).values.tolist()
            assert sorted((value for own in chosen for value in own), reverse=True) == largest
        places = ranks.gather(ranks.top(values[ranks.rank], 4).tolist())
        assert all(len(set(own)) == len(own) for own in places)
        # Of equal values, those with the smallest order: 0, 1 and 2, wherever they are.
        equal = torch.ones(2, dtype=torch.float64)
        order = torch.tensor([SIZE - 1 - ranks.rank, SIZE + ranks.rank])
        chosen = ranks.gather(ranks.top(equal, 3, order).tolist())
        assert chosen == [[0]] * SIZE


def outcome_of(ranks: Ranks, work: Callable[[], None]) -> str:
    try:
        with ranks.all_or_none():
            work()
    except Interrupted as stop:
        return f"stopped {stop} {stop.exit_code}"
    except RankError as error:
        return f"ranks: {error}"
    except ValueError as error:
        return f"own: {error}"
    return "done"


def check_together(ranks: Ranks) -> None:
    """Work ends well on all ranks or on none; then they can go on, in step."""
    for seed in range(40):
        rng = random.Random(seed)
        # Each rank: does its work, fails in it, or is asked to stop before or within it.
        fates = [rng.choice(["well", "well", "fails", "asked before", "asked within"]) for _ in range(SIZE)]
        mine = fates[ranks.rank]

        def work(mine: str = mine) -> None:
            if mine == "fails":
                raise ValueError(f"oops {ranks.rank}")
            if mine == "asked within":
                interruption.request("SIGINT", 130)

        if mine == "asked before":
            interruption.request("SIGTERM", 143)
        result = outcome_of(ranks, work)
        interruption.clear()
        failed = [rank for rank, fate in enumerate(fates) if fate == "fails"]
        asked = [rank for rank, fate in enumerate(fates) if fate.startswith("asked")]
        if mine == "fails":
            expected = f"own: oops {ranks.rank}"
        elif failed:  # an error goes before a wish to stop: nothing is saved that may be wrong
            expected = "ranks: " + "; ".join(f"rank {rank} failed: ValueError: oops {rank}" for rank in failed)
        elif asked:
            whose = ranks.rank if ranks.rank in asked else asked[0]
            expected = "stopped SIGTERM 143" if fates[whose] == "asked before" else "stopped SIGINT 130"
        else:
            expected = "done"
        assert result == expected, (seed, fates)
        assert ranks.gather(seed) == [seed] * SIZE


def check_two_threads(ranks: Ranks) -> None:
    """Collectives of two threads at once, in another order on each rank, reach their own kind."""
    other = ranks.for_another_thread()
    assert (other.rank, other.size, other.is_first) == (ranks.rank, ranks.size, ranks.is_first)
    found: list[Any] = []

    def work() -> None:
        interruption.request("SIGTERM")  # reaches the main thread, not the work of this one
        for number in range(50):
            with other.all_or_none():
                found.append(other.gather(("thread", number, ranks.rank)))
            found.append(other.broadcast(("thread", number, ranks.rank)))

    thread = threading.Thread(target=work)
    thread.start()
    for number in range(100):
        assert ranks.gather(("main", number, ranks.rank)) == [("main", number, rank) for rank in range(SIZE)]
    thread.join()
    interruption.clear()
    assert found[::2] == [[("thread", number, rank) for rank in range(SIZE)] for number in range(50)]
    assert found[1::2] == [("thread", number, 0) for number in range(50)]


def check_tensor_parallel(ranks: Ranks) -> None:
    """The processes of a tensor-parallel group are one rank: each has its number and its share of the data."""
    assert (ranks.rank, ranks.size) == (0, 1)
    strategy = Strategy(SIZE, init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("data_parallel", "tensor_parallel")))
    ranks = Ranks.of(strategy)
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, distributed.get_rank() == 0)
    assert ranks.share("abc") == list("abc")
    assert ranks.gather("mine") == ["mine"]
    assert ranks.sum(torch.ones(1)).item() == 1.0
    other = ranks.for_another_thread()
    assert other.broadcast(distributed.get_rank()) == 0
    assert other.control is not ranks.control
    assert distributed.get_process_group_ranks(other.control) == distributed.get_process_group_ranks(ranks.control)

    def work() -> None:
        if distributed.get_rank() == 2:
            raise ValueError("oops 2")

    expected = "own: oops 2" if distributed.get_rank() == 2 else "ranks: rank 2 failed: ValueError: oops 2"
    assert outcome_of(ranks, work) == expected, "a failure in any process stops all of them"


def check_all() -> None:
    assert Ranks.of(Strategy(SIZE)) is ALONE, "no process group yet"
    distributed.init_process_group("gloo")
    strategy = Strategy(SIZE)
    ranks = Ranks.of(strategy)
    assert Ranks.of(strategy) is ranks
    assert (ranks.rank, ranks.size, len(ranks)) == (int(os.environ["RANK"]), SIZE, SIZE)
    check_objects(ranks)
    check_numbers(ranks)
    check_choices(ranks)
    check_together(ranks)
    check_two_threads(ranks)
    check_tensor_parallel(ALONE)


def test_three_ranks_agree(tmp_path: Path) -> None:
    on_ranks(SIZE, check_all, folder=tmp_path)


class TestAlone:
    def test_everything_is_the_identity(self):
        value = torch.ones(2)
        assert ALONE.sum(value) is value
        assert ALONE.max(value) is value
        assert ALONE.gather("x") == ["x"]
        assert ALONE.all_to_all(["x"]) == ["x"]
        assert ALONE.share([1, 2]) == [1, 2]
        assert ALONE.any(True)
        assert not ALONE.any(False)
        assert Ranks.of(None) is ALONE
        assert Ranks.of(Strategy(1)) is ALONE
        assert ALONE.for_another_thread() is ALONE

    def test_errors_pass_as_they_are(self):
        error = KeyError("x")
        with pytest.raises(KeyError) as caught, ALONE.all_or_none():
            raise error
        assert caught.value is error

    def test_a_wish_to_stop_ends_the_work(self):
        with pytest.raises(Interrupted, match="SIGTERM") as caught, ALONE.all_or_none():
            interruption.request("SIGTERM", 143)
        interruption.clear()
        assert caught.value.exit_code == 143

"""Each rank loads its own part: the same bits as one process has, and never the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.models import gpt2, qwen2
from helpers.sharded import OPTIONS, NoTokenizer, meet, objective, on_ranks, saved_model, source_of
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import (
    ModelPolicy,
    PolicyOptions,
    PolicySource,
    PretrainedPolicy,
    Qwen2FromScratch,
    build_critic,
    build_policy,
    export_folder,
    full_tensor,
    local_part,
)
from ibro_lightning.models.building import parameters_on_meta
from ibro_lightning.models.weight_files import RankZero, WeightFiles, raise_on_all_ranks
from ibro_lightning.tasks import NumberPath

torch.set_num_threads(1)


class PeakBytes(TorchDispatchMode):
    """Most bytes that tensors which appear within have held at a time, this rank's shards among them."""

    def __enter__(self) -> Any:
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            tensor = tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def largest_and_all(network: nn.Module) -> tuple[int, int]:
    sizes = [parameter.numel() * parameter.itemsize for parameter in network.parameters()]
    return max(sizes), sum(sizes)


def check_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Parameters and buffers, persistent or not, bit for bit, in all their names, types and ties."""
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)(remove_duplicate=False))
        got = dict(getattr(ours, kind)(remove_duplicate=False))
        assert list(got) == list(expected)
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(full_tensor(got[name]), tensor), name
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert ours.training == theirs.training
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]


@contextmanager
def used(log: list[type]) -> Iterator[None]:
    """Notes where weights came from."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (WeightFiles, RankZero):
            fill = kind.fill

            def noted(self: Any, name: str, tensor: Tensor, fill: Any = fill) -> None:
                log.append(type(self))
                fill(self, name, tensor)

            patch.setattr(kind, "fill", noted)
        yield


class OwnSource(PolicySource):
    """A user's own: what it builds is known to rank 0 alone."""

    def tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    def config(self) -> Any:
        return qwen2().config

    def build(self, options: PolicyOptions) -> Any:
        return qwen2(seed=7).to(torch.float64)


class Doubled(PretrainedPolicy):
    """Builds in its own way, so its files are not what it gives."""

    def build(self, options: PolicyOptions) -> Any:
        model = super().build(options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        return model


def sources(folders: dict[str, Path]) -> Iterator[tuple[PolicySource, PolicyOptions, type]]:
    """What is loaded, and how."""
    for name in ("tied", "untied", "shards", "both"):  # both: a head of its own, which makes the config say untied
        yield source_of(folders[name]), OPTIONS, WeightFiles
    half = PolicyOptions(dtype="bfloat16")
    yield source_of(folders["untied"], half), half, WeightFiles
    for name in ("gpt2", "bin"):
        yield source_of(folders[name]), OPTIONS, RankZero
    yield Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_heads=2, num_kv_heads=1), PolicyOptions(), RankZero
    yield OwnSource(), OPTIONS, RankZero
    yield ModelPolicy(qwen2(seed=5)), OPTIONS, RankZero
    yield Doubled(str(folders["tied"]), OPTIONS), OPTIONS, RankZero


def load_each(folders: dict[str, Path]) -> None:
    sharding = meet()
    for source, options, kind in sources(folders):
        log: list[type] = []
        with used(log):
            policy = build_policy(source, options, sharding)
        assert set(log) == {kind}, str(source)
        critic = build_critic(source, options, sharding)
        single, single_critic = build_policy(source, options), build_critic(source, options)
        check_same(policy, single)
        check_same(critic, single_critic)
        if options.dtype != "bfloat16":
            torch.testing.assert_close(objective(policy, [1]), objective(single, [1]), rtol=1e-6, atol=0)
        export_folder(critic.model, NoTokenizer(), Path("out/critic"))
        again = source_of(Path("out/critic"), options)
        check_same(build_critic(again, options, sharding), single_critic)
        assert single.model.generation_config.to_dict() == policy.model.generation_config.to_dict()
        distributed.barrier()


def make_folders(root: Path) -> dict[str, Path]:
    folders = {name: root / name for name in ("tied", "untied", "shards", "gpt2", "bin", "both")}
    saved_model(folders["tied"])
    untied = qwen2(tie_word_embeddings=False)
    untied.generation_config.repetition_penalty = 1.5
    untied.save_pretrained(folders["untied"])
    untied.save_pretrained(folders["shards"], max_shard_size="4KB")
    assert len(list(folders["shards"].glob("*.safetensors"))) > 2
    gpt2().save_pretrained(folders["gpt2"])
    weights = {
        name.removeprefix("transformer."): t for name, t in load_file(folders["gpt2"] / "model.safetensors").items()
    }
    save_file(weights, folders["gpt2"] / "model.safetensors", metadata={"format": "pt"})  # as on the hub: other names
    for name in ("bin", "both"):
        saved_model(folders[name])
    weights = load_file(folders["both"] / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * 2},
        folders["both"] / "model.safetensors",
        metadata={"format": "pt"},
    )
    torch.save(load_file(folders["bin"] / "model.safetensors"), folders["bin"] / "pytorch_model.bin")
    (folders["bin"] / "model.safetensors").unlink()
    return folders


def test_every_kind_of_source_gives_the_bits_of_a_single_process(tmp_path: Path) -> None:
    on_ranks(2, load_each, make_folders(tmp_path), folder=tmp_path)


def measure(folder: Path) -> None:
    sharding = meet()
    rank = int(os.environ["RANK"])
    for source, spared in ((source_of(folder), False), (Doubled(str(folder), OPTIONS), True)):
        with PeakBytes() as loading:
            policy = build_policy(source, OPTIONS, sharding)
        largest, total = largest_and_all(policy)
        assert total > 10 * largest, "or the bound below says little"
        if rank or not spared:  # without files of its format, rank 0 builds the model on its CPU
            # A parameter in transit, its shards, and one before them that gloo's thread has not let go of yet.
            assert loading.peak <= total / 2 + 4 * largest, (loading.peak / total, largest / total)
        with PeakBytes() as handing_out:
            for _ in policy.named_full_weights():
                pass
        assert handing_out.peak <= total / 2 + 4 * largest, (handing_out.peak / total, largest / total)
        with PeakBytes() as exporting:
            export_folder(policy.model, NoTokenizer(), Path("out/model"))
        # Rank 0 keeps the whole, in the CPU's memory, for the file.
        assert exporting.peak <= total / 2 + 4 * largest + (0 if rank else total)


def test_no_rank_ever_holds_a_whole_copy(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", num_hidden_layers=12, hidden_size=32, intermediate_size=32)
    on_ranks(2, measure, model, folder=tmp_path)


def read_own_rows(folder: Path) -> None:
    """Counted where the file is read."""
    sharding = meet()
    read: list[int] = []
    real = WeightFiles._read

    def counted(self: WeightFiles, *place: Any) -> Tensor:
        part = real(self, *place)
        read.append(part.numel())
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "_read", counted)
        policy = build_policy(source_of(folder), OPTIONS, sharding)
    own = [p.to_local().numel() for p in policy.parameters()]
    assert sum(read) == sum(own) < sum(p.numel() for p in policy.parameters())


def test_each_rank_reads_its_own_rows_of_the_files(tmp_path: Path) -> None:
    on_ranks(2, read_own_rows, saved_model(tmp_path / "model"), folder=tmp_path)


class Unbuildable(OwnSource):
    def build(self, options: PolicyOptions) -> Any:
        raise ConfigError("model.policy", "mine", "it cannot be built")


def hear_of_errors(folder: Path) -> None:
    sharding = meet()
    rank = distributed.get_rank()
    with pytest.raises(ConfigError, match=r"model\.policy: 'mine' - it cannot be built"):
        build_policy(Unbuildable(), OPTIONS, sharding)
    if rank == 1:
        (folder / "model.safetensors").write_bytes(b"no safetensors")
    distributed.barrier()
    with pytest.raises(ConfigError, match="cannot load its weights"):
        build_policy(source_of(folder), OPTIONS, sharding)

    class Local(Exception):  # cannot travel
        pass

    def attempt() -> int:
        if rank == 1:
            raise Local("only here")
        return 5

    with pytest.raises(RuntimeError if rank == 0 else Local, match="only here"):
        raise_on_all_ranks(attempt)
    assert raise_on_all_ranks(lambda: rank) == rank
    options = replace(PolicyOptions(), packing=True)
    policy = build_policy(Qwen2FromScratch(NumberPath(size=12)), options, sharding)
    policy.check_packing()  # a forward pass of its own, before any other


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    on_ranks(2, hear_of_errors, saved_model(tmp_path / "model"), folder=tmp_path)


def parts() -> None:
    """``local_part`` against torch's own cut, for uneven sizes and more ranks than rows."""
    sharding = meet(2, 2)
    for shape in ((5, 3), (1, 4), (7,), (4, 6)):
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        layouts = [[Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
        if len(shape) == 2:
            layouts += [[Shard(0), Shard(1)], [Shard(1), Shard(0)]]
        for placements in layouts:
            spread = distribute_tensor(tensor, sharding.mesh, placements)
            assert torch.equal(local_part(spread, tensor), spread.to_local()), (shape, placements)


def test_a_ranks_part_is_what_torch_cuts(tmp_path: Path) -> None:
    on_ranks(4, parts, folder=tmp_path)


# In one process.


def test_modules_made_without_parameters_have_their_buffers_and_ties() -> None:
    state = torch.get_rng_state()
    with parameters_on_meta():
        model = qwen2()
        assert not model.model.rotary_emb.inv_freq.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in qwen2().parameters()), "and only within"
    assert torch.equal(model.model.rotary_emb.inv_freq, qwen2().model.rotary_emb.inv_freq)


def test_files_that_lack_a_weight_or_have_another_shape_do_not_fit(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    files = WeightFiles.find(str(folder), "main")
    assert files is not None
    assert files.fits(qwen2())
    assert not files.fits(qwen2(num_hidden_layers=3))
    assert not files.fits(qwen2(intermediate_size=32))
    assert files.fits(qwen2(tie_word_embeddings=False), frozenset({"lm_head.weight"}))
    assert WeightFiles.find(str(tmp_path), "main") is None

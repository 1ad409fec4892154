"""What a training step keeps in memory: on one process, and on each of two fsdp2 ranks.

    python benchmarks/fsdp2_memory.py --policy FOLDER              # a Hugging Face folder, such as SmolLM2-135M's
    python benchmarks/fsdp2_memory.py --policy FOLDER --ranks 4

Every figure is of one process, in MiB, and comes from a process of its own:

- counted: bytes of the parameters, gradients and AdamW states that the process keeps after a step;
- load: the highest resident memory while the policy is loaded and read once, less that of the interpreter with
  everything imported. Pages of the weight files are in it while they are mapped;
- step: the same while two steps are taken, with activations and gathered weights.

glibc keeps freed blocks of up to 32 MiB for later, and the gathered weights of a decoder block are of that size: the
resident memory of the ranks is then about twice what they use. So the processes are started with
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` 131072, with which freed blocks go back to the operating
system. ``--glibc`` leaves it alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models import PolicyOptions, PretrainedPolicy, Sharding, build_policy, clip_gradients

MIB = 2**20


def memory(kind: str) -> float:
    """VmRSS (now) or VmHWM (highest so far) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def kept_bytes(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    kept = [*network.parameters(), *(p.grad for p in network.parameters() if p.grad is not None)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(rank: int, ranks: int, folder: str, tokens: int, checkpointing: bool, scratch: str) -> None:
    torch.set_num_threads(1)
    sharding = None
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        sharding = Sharding(mesh, torch.device("cpu"))
    options = PolicyOptions(gradient_checkpointing=checkpointing)
    source = PretrainedPolicy(folder, options)
    sequences = Sequences.collate([[1] * (tokens // 2)] * 2, [list(range(2, 2 + tokens // 2))] * 2)
    gc.collect()
    base = memory("VmRSS")
    forget_peak()
    policy = build_policy(source, options, sharding)
    for parameter in policy.parameters():  # a single process has only mapped them so far
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).sum()
    loading = memory("VmHWM") - base
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    gc.collect()
    forget_peak()
    for _ in range(2):
        optimizer.zero_grad()
        policy(sequences, temperature=1.0)[0].sum().backward()
        clip_gradients(policy.parameters(), 1.0)
        optimizer.step()
    result = {
        "counted": kept_bytes(policy, optimizer) / MIB,
        "load": loading,
        "step": memory("VmHWM") - base,
        "interpreter": base,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
    }
    Path(scratch, f"{rank}.json").write_text(json.dumps(result))
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def run(ranks: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        settings = (ranks, arguments.policy, arguments.tokens, arguments.gradient_checkpointing, scratch)
        multiprocessing.spawn(measure, args=settings, nprocs=ranks)
        return [json.loads(Path(scratch, f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of each of the step's two sequences")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--glibc", action="store_true", help="leave the allocator as it is")
    arguments = parser.parse_args()
    if not arguments.glibc:  # for the processes that are to be started
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    [single], sharded = run(1, arguments), run(arguments.ranks, arguments)
    print(f"{single['parameters'] / 1e6:.1f} M parameters, float32, two sequences of {arguments.tokens} tokens; MiB")
    print(f"{'':12}{'one process':>14}" + "".join(f"{f'rank {rank}':>12}" for rank in range(arguments.ranks)))
    for name in ("counted", "load", "step", "interpreter"):
        print(f"{name:12}{single[name]:14.0f}" + "".join(f"{rank[name]:12.0f}" for rank in sharded), end="")
        print("" if name == "interpreter" else f"   ratio {max(rank[name] for rank in sharded) / single[name]:.3f}")


if __name__ == "__main__":
    main()

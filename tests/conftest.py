"""Shared fixtures: one thread (two contended OpenMP pools are far slower than one), and a tiny policy on disk.

xdist's controller, for which the workers wait, imports this file and runs no test: what takes long to import is
imported where it is used."""

from __future__ import annotations

import gc
import os
import signal
import textwrap
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.user_code import USER_CODE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast

TESTS = Path(__file__).parent
# Processes that tests start find the package of this checkout, whichever one is installed, and the helpers; pytest
# itself by pyproject.
PLACES = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PLACES))
# A process that is killed loses nothing of what it has given the kernel, so waiting for the disk would show nothing.
# That files are synced, and in which order, is seen from the calls, in test_damaged_checkpoints.py.
os.fsync = lambda descriptor: None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Imported modules and collected tests stay for the whole session: the garbage collector need not visit them."""
    gc.disable()
    if not session.config.pluginmanager.has_plugin("dsession"):  # the controller's, which collects nothing
        import torch
        from hypothesis import settings

        torch.set_num_threads(1)
        settings.register_profile("untimed", deadline=None)  # an example takes as long as a busy machine lets it
        settings.load_profile("untimed")
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A test leaves the environment as it was: Lightning keeps a run's seed there, and the next run would use it."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ |= before


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where pytest was started in the background: shells ignore it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Qwen2 with a few thousand parameters and the number-path tokenizer."""
    from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
    from ibro_lightning.tasks import NumberPath

    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    folder = tmp_path_factory.mktemp("policy") / "model"
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from ibro_lightning.tasks import NumberPath

    return NumberPath().tokenizer()


def half_only(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Like flash attention, which transformers gives half precision under autocast or with half-precision weights."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("FlashAttention only supports fp16 and bf16")
    return sdpa_attention_forward(module, query, *args, **kwargs)


@pytest.fixture
def half_only_attention() -> Iterator[str]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    yield "half_only"
    del AttentionInterface._global_mapping["half_only"], AttentionMaskInterface._global_mapping["half_only"]


@pytest.fixture
def workspace(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with code of their own and a recipe ``tiny.yaml`` that runs in a second.

    ``max_skips`` lets a run of any length go on when its policy gets everything right, after some twenty iterations."""
    (tmp_path / "user_code.py").write_text(USER_CODE)
    (tmp_path / "tiny.yaml").write_text(
        textwrap.dedent(f"""
        seed_everything: 3
        num_threads: 1
        trainer: {{accelerator: cpu, max_epochs: 2, check_val_every_n_epoch: 2, default_root_dir: run}}
        model:
          class_path: DAPOModule
          init_args:
            policy: {tiny_policy}
            regularizer: {{class_path: InformationBottleneck}}
            optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
            warmup_steps: 0
            mini_batch_prompts: 2
        data:
          class_path: RolloutDataModule
          init_args:
            source: {{class_path: user_code.Starts}}
            reward: {{class_path: user_code.SaysEquals}}
            sampling: {{temperature: 1.0, max_tokens: 6}}
            prompts_per_rollout: 4
            group_size: 4
            allow_overlap: true
            reward_pool: null  # starting its processes, which import user_code, takes longer than these runs
            dynamic_sampling: {{max_rounds: 2, on_exhausted: fill, max_skips: 1000000}}
            eval_sets:
              starts:
                source: {{class_path: user_code.Starts}}
                reward: {{class_path: user_code.SaysEquals}}
                samples: 4
                sampling: {{max_tokens: 6}}
        samples: {{every_n_iterations: 1}}
        checkpoint: {{every_n_iterations: 1}}
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path

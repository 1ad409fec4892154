"""Weights in a private folder of safetensors files, on their way to a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from ibro_lightning.engines.weight_folder import private_folder, write_weights


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_files_are_as_large_as_allowed_and_hold_the_weights_bit_for_bit(tmp_path, limit):
    shared = torch.randn(6, 4)
    weights = {
        "embedding": shared,
        "head": shared,  # tied
        "transposed": torch.randn(4, 6).T,
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2.5, requires_grad=True),
    }
    write_weights(weights.items(), tmp_path, limit)
    files = sorted(tmp_path.iterdir())
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == {1: 5, 100: 3, 10**9: 1}[limit]
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_weight_may_change_once_the_next_is_asked_for(tmp_path):
    """Gathered weights may share a buffer."""
    buffer = torch.zeros(3)

    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        for value in (1.0, 2.0):
            yield str(value), buffer.fill_(value)

    write_weights(reused(), tmp_path)
    assert load_file(tmp_path / "weights-00000.safetensors")["1.0"].tolist() == [1, 1, 1]


def test_the_private_folder_goes_also_after_an_error(tmp_path):
    def fails() -> None:
        with private_folder(str(tmp_path)) as folder:
            (folder / "file").touch()
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        fails()
    assert list(tmp_path.iterdir()) == []

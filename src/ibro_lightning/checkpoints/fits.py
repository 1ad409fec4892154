"""Is a checkpoint of this model?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ibro_lightning.errors import ConfigError


def check_fits(saved: Mapping[str, Iterable[int]], module: nn.Module, path: str | Path) -> None:
    """Compare the names and shapes of saved weights with a module's.

    Raises:
        ConfigError: they differ; in one line, not with torch's list of all of them.
    """
    shapes = {name: tuple(shape) for name, shape in saved.items()}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    differ = [name for name in sorted(wanted.keys() & shapes.keys()) if wanted[name] != shapes[name]]
    said = [f"it lacks {len(missing)} weights, such as {missing[0]}"] if missing else []
    said += [f"it has {len(unknown)} weights more, such as {unknown[0]}"] if unknown else []
    said += [f"its {n} is {list(shapes[n])}, not {list(wanted[n])}" for n in differ[:1]]
    if said:
        raise ConfigError(
            "ckpt_path",
            str(path),
            f"it is of another model or algorithm than this {type(module).__name__}: {'; '.join(said)}. "
            "Continue with the recipe that its run was started with",
        )

"""What an exported folder holds besides its weights. No failure here costs the weights: it is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ibro_lightning.guards.disk import as_disk_full
from ibro_lightning.models.folders import is_of_tokenizer
from ibro_lightning.ranks import rank_zero_warn

_PLACE = ".tokenizer"
"""Where a tokenizer's files are tried out, in the folder that is being written."""
PROBES = (
    "Hello,  world!",
    "12+34=46",
    "\n\n\tx = [1, 2]; ",
    "\\frac{a}{b}",
    "Grüße, 中文, 🙂 ½",
    "a</s> b<|im_end|>\n",
)


def report(folder: Path, what: str) -> None:
    """Warn about a file of ``folder``."""
    rank_zero_warn(f"{folder.name.removesuffix('.partial')}: {what}")


def attempt(folder: Path, what: str, write: Callable[[], Any]) -> bool:
    """Whether ``write`` succeeds; a failure is reported in one line.

    Raises:
        Exception: the disk is full.
    """
    try:
        write()
    except Exception as error:
        if as_disk_full(error, folder / what) is not None:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        report(folder, f"{what} cannot be written ({reason})")
        return False
    return True


def write_beside(tokenizer: Any, folder: Path, originals: Mapping[str, Path], *, trust_remote_code: bool) -> None:
    """Write the tokenizer, and copy the model's other files: processors, and code if it is trusted.

    Args:
        folder: already holds weights and config.
        originals: the base model's files besides its weights, by name.
    """
    _write_tokenizer(tokenizer, folder, originals, trust_remote_code)
    others = [name for name in originals if not (is_of_tokenizer(name) or (folder / name).exists())]
    _copy({name: originals[name] for name in others}, folder)


def _write_tokenizer(tokenizer: Any, folder: Path, originals: Mapping[str, Path], trust_remote_code: bool) -> None:
    """Write the tokenizer's files, or copy the original ones if new ones would not load as this tokenizer."""
    place = folder / _PLACE
    new, old = place / "new", place / "old"
    try:
        written = attempt(folder, "the tokenizer", lambda: tokenizer.save_pretrained(new))
        chosen = new
        # Tokenizers that are not transformers' own are not checked.
        if not written or (
            isinstance(tokenizer, PreTrainedTokenizerBase) and not _reads(new, tokenizer, folder, trust_remote_code)
        ):
            _copy({name: file for name, file in originals.items() if is_of_tokenizer(name)}, old)
            if _reads(old, tokenizer, folder, trust_remote_code):
                chosen = old
                report(folder, "the tokenizer's files are those of the base model, as new ones would be read otherwise")
            else:
                chosen = new if written else old
                report(folder, "AutoTokenizer does not open its tokenizer as the one that was trained with")
        _copy({str(file.relative_to(chosen)): file for file in sorted(chosen.rglob("*")) if file.is_file()}, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _reads(place: Path, tokenizer: Any, folder: Path, trust_remote_code: bool) -> bool:
    """Whether a model folder with the files in ``place`` loads as ``tokenizer``."""
    config = place / "config.json"
    try:
        shutil.copyfile(folder / "config.json", config)
        other = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)
        # Tokenizer classes differ in text without tokens: they drop it, or mark it as unknown.
        probes = [text for text in PROBES if text in tokenizer.decode(tokenizer(text)["input_ids"])]
        return bool(_behaviour(other, probes) == _behaviour(tokenizer, probes))
    except Exception:  # a foreign file may raise anything
        return False
    finally:
        config.unlink(missing_ok=True)


def _behaviour(tokenizer: Any, probes: Sequence[str]) -> tuple[Any, ...]:
    tokens = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token]
    return tokenizer.get_vocab(), tokens, tokenizer.chat_template, [tokenizer(text)["input_ids"] for text in probes]


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    """Copy contents without permissions, since originals may be read-only."""

    def copy(name: str, file: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)

    for name, file in files.items():
        attempt(folder, name, lambda name=name, file=file: copy(name, file))  # type: ignore[misc]

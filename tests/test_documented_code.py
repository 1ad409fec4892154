"""The Python blocks of README.md and docs/*.md run as they stand, and the examples in docstrings print what they say.

The blocks of a page are one script, run from top to bottom in an empty folder: a block may use what earlier ones of its
page have made. A block that needs more than a laptop, or is a fragment, has the comment ``<!-- not run: WHY -->`` on
the line before its fence. Each block takes seconds.
"""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    """The first line of the code, from 1."""
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Those that are run."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if not NOT_RUN.search(text[: match.start()])]
    return [Block(page, text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


PAGES = {page: blocks_of(page) for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


class Script:
    """A page's blocks as one module, executed as far as somebody has asked for."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.blocks, self.folder, self.done = PAGES[page], folder, 0
        self.broken: Block | None = None
        self.module = ModuleType(f"documented_{page.stem.replace('-', '_')}")  # dataclasses and pickle look it up
        sys.modules[self.module.__name__] = self.module

    def run_to(self, block: Block) -> None:
        assert self.broken is None, f"it follows {self.broken}, which fails"
        for due in self.blocks[self.done : self.blocks.index(block) + 1]:
            code = "\n" * (due.line - 1) + due.code  # a traceback shows the page's own lines
            self.broken = due
            exec(compile(code, str(due.page), "exec"), vars(self.module))
            self.broken, self.done = None, self.done + 1


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Script]:
    return {page: Script(page, tmp_path_factory.mktemp(page.stem)) for page in PAGES}


@pytest.mark.parametrize("block", [block for blocks in PAGES.values() for block in blocks], ids=str)
def test_the_block_runs(block: Block, scripts: dict[Path, Script], monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripts[block.page]
    monkeypatch.chdir(script.folder)
    script.run_to(block)


def test_a_block_that_is_marked_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\none = 1\n```\n\n<!-- not run: needs 8 GPUs -->\n```python\nraise SystemExit\n```\n"
        "```console\n$ ls\n```\n\n```python\nassert one == 1\n```\n"
    )
    assert [(block.line, block.code) for block in blocks_of(page)] == [(2, "one = 1\n"), (14, "assert one == 1\n")]


WITH_EXAMPLES = sorted(path for path in (ROOT / "src").rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_the_examples_of_a_module_print_what_they_say(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed

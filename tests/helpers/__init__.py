"""What several test files share. Failed assertions in here show their values, as those of test files do."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(*(f"helpers.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py")))

"""``verify``: the verdict, both readings, and an exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ibro_lightning.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (["1/2", r"\boxed{0.5}"], 0, ["right: exact", "gold    1/2", "answer  1/2"]),
        ([r"\frac{11}{4}", r"$2\left(\frac34\right)$"], 1, ["wrong: another value", "gold    11/4", "answer  2·(3/4)"]),
        (["-7", "-7"], 0, ["right: exact", "gold    −7", "answer  −7"]),
        (["5 cm", "$5$ m"], 1, ["wrong: another unit", "gold    5 (1/100 m)", "answer  5 (m)"]),
        (["5 cm", "$5$ m", "--units", "ignored"], 0, ["right: exact", "gold    5 (1/100 m)", "answer  5 (m)"]),
        (["30", r"$5 \cdot 6$", "--simplified"], 1, ["wrong: not simplified", "gold    30", "answer  5·6"]),
        (["10", "$7(3)$", "--equality", "library"], 0, ["right: library", "gold    10", "answer  7·3"]),
        (["34", "I do not know."], 1, ["wrong: no answer", "gold    34", "answer  none found"]),
        (["Monday", r"\text{monday}"], 0, ["right: exact", 'gold    "monday"', 'answer  "monday"']),
    ],
)
def test_says_verdict_and_readings(
    arguments: list[str], code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if code:
        with pytest.raises(SystemExit) as ended:
            main(["verify", *arguments])
        assert ended.value.code == code
    else:
        main(["verify", *arguments])
    assert capsys.readouterr().out.splitlines() == lines


def test_a_gold_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "", "5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: gold: '' - it is empty\n"


def test_it_needs_no_torch() -> None:
    code = "from ibro_lightning.cli.main import main; main(['verify', '1', '$1$']); "
    subprocess.run([sys.executable, "-c", code + "import sys; assert 'torch' not in sys.modules"], check=True)

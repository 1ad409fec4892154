"""Gold answers: what a box holds, and one spelling of plain numbers with everything else left alone."""

from __future__ import annotations

import json
import os
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibro_lightning.rewards.mathematics.gold_text import after_hashes, boxed, canonical_gold

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))


class TestBoxed:
    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            (r"\boxed{204}", "204"),
            (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            (r"\boxed{1} then \boxed{2}", "2"),
            (r"\boxed{1} then \fbox{2} end", "2"),
            (r"\boxed {7}", "7"),
            (r"\boxed{}", ""),
            (r"\boxed{\{1,2\}}", r"\{1,2\}"),
            (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
            (r"\boxed{a\\b}", r"a\\b"),
            (r"\boxed{a \text{ if } {b}} and }", r"a \text{ if } {b}"),
            (r"\boxed{\boxed{3}}", "3"),
        ],
    )
    def test_the_last_box_is_read_to_its_own_brace(self, text, inside):
        assert boxed(text) == inside

    @pytest.mark.parametrize(
        "text", ["", "204", "boxed{3}", r"\boxed 3", r"\boxed", r"\boxed{3", r"\boxed{1} \boxed{2", r"\boxed{1\}"]
    )
    def test_none_without_a_closed_box(self, text):
        assert boxed(text) is None

    @given(st.recursive(st.sampled_from(["x", "1", " ", r"\{", r"\\", r"\frac"]), lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join), inner.map(lambda text: "{" + text + "}"))))  # fmt: skip
    def test_any_balanced_content_comes_back(self, content):
        assert boxed(rf"before {{ }} \boxed{{{content}}} after {{ }}}}") == content

    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            (r"\boxed{" * 200_000, None),
            (r"\boxed{" + "{" * 1_000_000, None),
            (r"\boxed" + " " * 1_000_000, None),
            (r"\boxed   " * 100_000, None),
            (r"\boxed{" * 100_000 + "}" * 100_000, ""),
            (r"\boxed{" + "9" * 1_000_000 + "}", "9" * 1_000_000),
            (r"\boxed{" + "\\" * 1_000_001 + "}", None),
        ],
        ids=range(7),
    )
    def test_megabytes_of_hostile_text(self, text, inside):
        """Anything quadratic would be at it for hours."""
        assert boxed(text) == inside


class TestAfterHashes:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("48/2 = 24\n#### 72", "72"),
            ("#### 1\nthen\n####  1,234 \n", "1,234"),
            ("####5", "5"),
            ("####", ""),
            ("no hashes", None),
            ("inside a line #### 5", None),
        ],
    )
    def test_the_last_line_that_begins_with_them(self, text, answer):
        assert after_hashes(text) == answer


class TestCanonicalGold:
    @pytest.mark.parametrize(
        ("answer", "canonical"),
        [
            ("27", "27"),
            ("27.0", "27"),
            (27, "27"),
            (27.0, "27"),
            (Decimal("27.00"), "27"),
            ("-3.00", "-3"),
            (-3, "-3"),
            ("−3", "-3"),
            ("+5", "5"),
            ("033", "33"),
            ("000", "0"),
            ("0", "0"),
            (0, "0"),
            ("-0.0", "0"),
            ("1,234", "1234"),
            ("1,234,567.50", "1234567.50"),
            (r"10,\!080", "10080"),
            (r"11,\! 111,\! 111,\! 100", "11111111100"),
            ("10{,}080", "10080"),
            (r"336^\circ", "336"),
            (r"336^{\circ}", "336"),
            ("336°", "336"),
            (r"$336^\circ$.", "336"),
            (r"\$32,\!348", "32348"),
            ("$18", "18"),
            (r"$\boxed{033}$", "33"),
            (r"\boxed{\boxed{3}}", "3"),
            ("$$7$$", "7"),
            (r"\(7\)", "7"),
            (r"\[7\]", "7"),
            ("27.", "27"),
            ("  27\n", "27"),
            ("Evelyn.", "Evelyn"),
            (1e22, "10000000000000000000000"),
            (0.1, "0.1"),
            (2.5e-7, "0.00000025"),
            ("9" * 5000, "9" * 5000),
            (True, "True"),
        ],
    )
    def test_one_spelling(self, answer, canonical):
        assert canonical_gold(answer) == canonical

    @pytest.mark.parametrize(
        "answer",
        [
            r"\frac{1}{2}",
            r"\left( 3, \frac{\pi}{2} \right)",
            "1,2,3",
            "1, 234",
            "0,123",
            "1,-2",
            "(1,234)",
            "12,34",
            r"\sin 30^\circ",
            r"45^\circ, 135^\circ",
            r"28\%",
            "$a$ and $b$",
            r"\(a\) and \(b\)",
            r"\boxed{1}, \boxed{2}",
            r"\left\{ x \right.",
            "0.333...",
            "5 p.m.",
            "0.50",
            ".0000672",
            "52_8",
            r"\text{Evelyn}",
            "x=5",
            "27.0 cm",
            "1e3",
            "{27}",
            "1/3",
            "٣.0",
        ],
    )
    def test_the_rest_is_left_alone(self, answer):
        assert canonical_gold(answer) == answer

    FRAGMENTS = (
        *(
            "$",
            "$$",
            r"\(",
            r"\)",
            r"\[",
            r"\]",
            r"\boxed{",
            "}",
            "{",
            ".",
            ",",
            r"\!",
            "0",
            "1",
            "27",
            "234",
            "-",
            "−",
        ),
        *("+", " ", "\n", r"^\circ", "°", r"\$", r"\frac{1}{2}", "x", "a.b.", "...", "\\"),
    )

    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join) | st.text(max_size=30))
    def test_again_changes_nothing(self, answer):
        canonical = canonical_gold(answer)
        assert canonical_gold(canonical) == canonical

    @given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
    def test_numbers_keep_their_value_and_text_and_json_agree(self, number):
        assert Decimal(canonical_gold(number)) == Decimal(str(number))
        if isinstance(number, int):
            assert (
                canonical_gold(number) == canonical_gold(str(number)) == canonical_gold(f"{number:,}.0") == str(number)
            )

    @pytest.mark.parametrize("answer", [float("nan"), float("inf"), Decimal("NaN")])
    def test_what_is_no_number_is_refused(self, answer):
        with pytest.raises(ValueError, match="is no answer"):
            canonical_gold(answer)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")
@pytest.mark.parametrize(
    "name", ["aime24", "aime25", "amc23", "gsm8k_test_400", "gsm8k_train_1000", "dapo_math_17k_64"]
)
def test_every_integer_of_the_real_files_survives_each_presentation(name):
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        gold = json.loads(line)["answer"]
        assert re.fullmatch(r"-?\d+", gold)
        presentations = [gold, f"{gold}.0", f"${gold}$", rf"{gold}^\circ", rf"\boxed{{{gold}}}.", int(gold)]
        if abs(int(gold)) < 2**53:  # one DAPO answer has 18 digits, more than a float of a JSON file can hold
            presentations.append(float(gold))
        for shown in presentations:
            assert canonical_gold(shown) == str(int(gold)), shown

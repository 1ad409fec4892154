"""The report: what it says, the files it writes, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.studies import ARMS, final_rows, invented_study, small_study, study_file, write_results
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.analysis import Comparison
from ibro_lightning.studies.plan import study_of
from ibro_lightning.studies.report import figures
from ibro_lightning.studies.report.blocks import Report, Section, Table, Text, html, markdown
from ibro_lightning.studies.report.command import write_report
from ibro_lightning.studies.report.conclusions import of_comparison
from ibro_lightning.studies.report.wording import p_value, title_of, unit_of
from ibro_lightning.studies.statistics import Interval, paired_difference

PERCENT = unit_of("avg@16")
WORDS = pytest.mark.usefixtures("undrawn")
"""For tests that read a report's words: drawing its images is most of the work."""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", lambda *_, **__: b"an image")


def said(differences: Sequence[float], *, matters: float | None = 0.02, comparisons: int = 1) -> str:
    """What the report says of two arms with these differences over seeds."""
    reference = np.linspace(0.7, 0.8, len(differences))
    paired = paired_difference(reference, reference + np.array(differences), comparisons=comparisons)
    study = study_of(study_file([1], difference_that_matters=matters), "study.yaml")
    comparison = Comparison("none", "ib", paired, min(1.0, comparisons * paired.p_value))
    return " ".join(of_comparison(comparison, study, PERCENT, comparisons))


def test_a_difference_beyond_what_matters() -> None:
    text = said([0.05, 0.06, 0.04, 0.05, 0.05, 0.06, 0.04, 0.05])
    assert "DAPO + IB ended 5.0 points above DAPO (mean over 8 seeds, higher on 8 and lower on 0 of them)." in text
    assert "sign-flip test gives p = 0.0078." in text
    assert "At the level 0.05 the two arms differ. The whole interval is beyond the 2.0 points that matter" in text


def test_no_significant_difference_is_not_called_equality() -> None:
    text = said([0.03, -0.02, 0.01, -0.04, 0.02, -0.01, 0.03, -0.03])
    assert "The test finds no difference, which does not show that there is none." in text
    assert re.search(r"80 % of studies would find a difference of 3\.\d points or more", text)
    assert "That it is better by 2.0 points or worse by 2.0 points or more, which matters by the plan, remains" in text
    assert not re.search(r"equal|no effect|the same", text)


def test_differences_that_matter_may_be_outside_the_interval() -> None:
    text = said([0.001, -0.001, 0.002, -0.002, 0.001, -0.001, 0.002, -0.002])
    assert "Differences of 2.0 points, which matter by the plan, are outside the interval in both directions." in text


def test_few_pairs_cannot_show_anything_by_this_test() -> None:
    text = said([0.05, 0.06, 0.04, 0.05, 0.05])
    assert "With 5 pairs a sign-flip test cannot give less than 0.0625" in text
    assert "which takes 6 pairs" in text
    assert (
        "The interval, which is of this difference alone, is on one side of 0: that is a hint, not a finding." in text
    )


def test_several_comparisons_are_corrected() -> None:
    text = said([0.05, 0.06, 0.04, 0.05, 0.05, 0.06, 0.04, 0.05], comparisons=6)
    assert "p = 0.0078, 0.0469 after Holm's correction for 6 comparisons." in text


@pytest.mark.parametrize(("differences", "part"), [([], "no seed has finished"), ([0.1], "One pair says nothing")])
def test_too_little_to_compare(differences: list[float], part: str) -> None:
    assert part in said(differences)


def test_numbers_as_they_are_written() -> None:
    assert PERCENT.estimate_of_difference(Interval(-0.012, -0.03, 0.0, 8)) == "−1.2 points [−3.0, +0.0]"
    assert PERCENT.value(-0.0001) == "0.0 %"
    assert unit_of("policy/entropy").value(0.06) == "0.0600 nats"
    assert (p_value(float("nan")), p_value(1e-5), p_value(0.03)) == ("–", "< 0.0001", "0.0300")
    assert title_of("val/aime/pass@32") == "pass@32 on aime"


def test_a_report_on_a_whole_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(invented_study(tmp_path))])
    assert capsys.readouterr().out == f"report    {tmp_path}/report.html\nmarkdown  {tmp_path}/report.md\n"
    text, page = (tmp_path / "report.md").read_text(), unescape((tmp_path / "report.html").read_text())
    for part in (
        "All 24 trials have finished.",
        "DAPO + IB ended",
        "question: Does IB help a small policy on number paths?",
        "the study file is not committed".capitalize(),
        "By the plan's standard deviation of paired differences (2.5 points), 8 seeds find a difference of",
        "Time: the 24 finished trials took 6.0 hours one after the other, and 3.0 CPU hours.",
        "at the entropy that DAPO has at temperature 1",
        "Questions that changed most",
        "python -m ibro_lightning study --config studies/invented.yaml",
        '"scipy": "1.17.1"',
    ):
        assert part in text
        assert part in page
    images = re.findall(r"\]\((report_images/[^)]+\.png)\)", text)
    assert len(images) == 11
    for image in images:
        assert Image.open(tmp_path / image).width > 600
    assert page.count('src="data:image/png;base64,') == len(images)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is loaded from elsewhere
    for heading in ("Accuracy at matched entropy", "Other metrics at the end", "Questions that changed most"):
        assert f"## {heading} (exploratory)" in text
    assert "## Result\n" in text


@WORDS
def test_a_report_of_a_study_with_a_failing_arm_that_is_still_running(tmp_path: Path) -> None:
    text = write_report([invented_study(tmp_path, 8, failing=True)]).with_suffix(".md").read_text()
    assert (
        "22 of 24 trials have finished, 1 failed, 1 have not ended: numbers below are of finished trials only." in text
    )
    assert "Trials of DAPO + naive failed. If runs fail because they go badly, that arm's mean is too high." in text
    assert "looking early is not in the plan" in text
    assert "| DAPO + naive | 8 | failed | 2 | WeightSyncError: after a sync" in text
    assert "Seeds 7 and 8 have no result in one of the two." in text


@WORDS
@pytest.mark.parametrize(("expected", "optimistic"), [(0.001, True), (0.5, False)])
def test_the_spread_that_was_expected_is_compared_with_the_one_found(
    tmp_path: Path, expected: float, optimistic: bool
) -> None:
    rows = final_rows({"none": [0.80, 0.70, 0.75], "ib": [0.90, 0.75, 0.86]})  # differences 10, 5 and 11 points
    write_results(tmp_path, rows, study_file([1, 2, 3], paired_sd=expected, comparisons=[["none", "ib"]]))
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert "In this study it was 3.2 points" in text
    assert ("the plan expected to find more than it could" in text) is optimistic


@WORDS
def test_the_machine_hours_say_that_warm_starts_are_not_in_them_where_there_are_any(tmp_path: Path) -> None:
    with (invented_study(tmp_path) / "study.yaml").open("a") as file:
        file.write("base_policy: {recipe: sft_quickstart.yaml}\n")
    assert "3.0 CPU hours; warm starts are not counted." in write_report([tmp_path]).with_suffix(".md").read_text()


@WORDS
def test_what_people_wrote_about_the_results_is_a_section_that_says_so(tmp_path: Path) -> None:
    invented_study(tmp_path)
    (tmp_path / "discussion.md").write_text("The paper says\nso: a < b.\n\n\nWe would change our mind if not.\n")
    report = write_report([tmp_path])
    text, page = report.with_suffix(".md").read_text(), report.read_text()
    assert "## Discussion" in text
    assert "Written by people who had seen the results" in text
    for paragraph in ("The paper says so: a &lt; b.", "We would change our mind if not."):
        assert f"<p>{paragraph}</p>" in page


@WORDS
def test_a_discussion_that_is_no_text_is_named(tmp_path: Path) -> None:
    (invented_study(tmp_path) / "discussion.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"discussion\.md.*cannot be read"):
        write_report([tmp_path])


@WORDS
def test_alarms_of_the_runs_are_listed_by_arm(tmp_path: Path) -> None:
    rows = final_rows({"none": [0.8, 0.7], "ib": [0.9, 0.75]})
    alarm = "alarm/entropy_collapse"
    rows += [("none", seed, iteration, alarm, 0.0) for seed in (1, 2) for iteration in (10, 20)]
    rows += [("ib", 1, 10, alarm, 0.0), ("ib", 1, 20, alarm, 0.4), ("ib", 2, 10, alarm, 0.0), ("ib", 2, 20, alarm, 0.0)]
    arms = {name: ARMS[name] for name in ("none", "ib")}
    folder = write_results(tmp_path / "study", rows, study_file([1, 2], arms, comparisons=[["none", "ib"]]))
    write_report([folder], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("## Alarms")[1].splitlines()]
    assert ["arm", "entropy collapse"] in table
    assert ["DAPO", "–"] in table
    assert ["DAPO + IB", "1 of 2, by 20"] in table


@WORDS
def test_what_ran_the_trials_and_where_they_started(tmp_path: Path) -> None:
    path = small_study(tmp_path) / "trials.parquet"
    rows = pq.read_table(path).to_pylist()
    for row, policy in zip(rows, ("a", "b", "a", "c"), strict=True):
        row |= {"base_policy": policy, "code": "0123456789ab" + "+changes" * (policy == "c")}
    pq.write_table(pa.Table.from_pylist(rows), path)
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert "Seed 2: not all arms started from the same base policy" in text
    assert "Code: commit 0123456789ab (3 trials) and 0123456789ab+changes (1 trial)." in text


@WORDS
def test_a_report_before_any_trial_has_finished(tmp_path: Path) -> None:
    rows = [row for row in final_rows({"none": [0.3]}) if row[2] == 0]
    text = write_report([write_results(tmp_path, rows, study_file([1, 2]), running=[("none", 1)])]).with_suffix(".md")
    assert "0 of 6 trials have finished, 6 have not ended" in text.read_text()


@WORDS
def test_one_seed_and_one_arm(tmp_path: Path) -> None:
    study = study_file([1], {"none": ARMS["none"]}, comparisons=[])
    text = write_report([write_results(tmp_path, final_rows({"none": [0.8]}), study)]).with_suffix(".md").read_text()
    assert "| DAPO | 1 | 80.0 % | – | 80.0 % | – | – | 80.0 % | 80.0 % | 100 |" in text


def test_the_same_results_give_the_same_report(tmp_path: Path) -> None:
    folder = small_study(tmp_path / "results")
    first, second = (write_report([folder], tmp_path / name) for name in ("a", "b"))
    for path in first.parent.rglob("*.*"):
        assert path.read_bytes() == (second.parent / path.relative_to(first.parent)).read_bytes(), path


def test_a_report_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    folder = small_study(tmp_path)
    images = tmp_path / "report_images"
    images.mkdir()
    (images / "mine.png").write_bytes(b"mine")
    write_report([folder])
    shutil.copy(images / "differences.png", images / "curve_of_an_earlier_report.png")
    write_report([folder])
    assert not (images / "curve_of_an_earlier_report.png").exists()
    assert (images / "mine.png").read_bytes() == b"mine"
    (tmp_path / "report.md").write_text("my notes")
    with pytest.raises(ConfigError, match=r"report\.md' - no report wrote it: --overwrite moves it aside"):
        write_report([folder])
    write_report([folder], overwrite=True)
    assert (tmp_path / "report.md.1").read_text() == "my notes"


def test_text_of_users_stays_text() -> None:
    report = Report("A | *b* <script>", [Section("One", [Text(["a_b [x](y) <b>"]), Table(("|",), [["a|b\nc"]])])])
    assert "<script>" not in html(report)
    text = markdown(report)
    assert "# A | \\*b\\* \\<script>" in text
    assert "a_b [x\\](y) \\<b>" in text
    assert "| a\\|b c |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/study.yaml"),
        (["run"], "output: None - write the folder for the report"),
        (["study", "run"], "this is a study: report on one at a time"),
        (["study", "--metric", "policy/entropy"], "metric: 'policy/entropy' - a study's outcome is in its plan"),
        (["study", "--output", "study/study.yaml"], "no folder can be there"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    small_study(tmp_path / "study")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 1\n")
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib.*studies need `pip install ibro-lightning\[studies\]`"):
        write_report([small_study(tmp_path)])


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from ibro_lightning.cli.main import main
main(["report", {str(small_study(tmp_path))!r}])
print([name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n"), result.stderr


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOOK = """<iframe id="page" src="report.html" style="border:0" width="{width}" height="900"></iframe><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const images = [...page.images].filter(image => image.complete && image.naturalWidth > 0).length;
  document.title = "found " + JSON.stringify([root.scrollWidth, images, page.fonts.status]);
}};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    """In headless Chromium: tables scroll inside the page, and all images are shown."""
    write_report([invented_study(tmp_path, 3)])
    (tmp_path / "look.html").write_text(LOOK.format(width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/look.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>found \[(\d+),(\d+),", shown)
    assert found is not None, shown[-2000:]
    assert int(found[1]) <= width
    assert int(found[2]) == 11

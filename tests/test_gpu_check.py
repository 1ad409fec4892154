"""``benchmarks/gpu_check.py`` in miniature, on a CPU: the same code, sections that fail, lack a package or take too
long."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_check
from gpu import hardware
from gpu.report import Figures
from helpers.forked import fork_from


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All sections, as ``--miniature`` runs them."""
    with pytest.MonkeyPatch.context() as patch:
        fork_from(gpu_check, patch)
        return gpu_check.check(list(gpu_check.SECTIONS), True, tmp_path_factory.mktemp("check"))


def test_the_miniature_runs_every_section_that_can_run_here(result: dict[str, Any]) -> None:
    statuses = {name: outcome["status"] for name, outcome in result["sections"].items()}
    vllm = statuses.pop("vllm")
    assert statuses == dict.fromkeys(("machine", "head", "quickstart", "fsdp2"), "ok"), result
    assert vllm in ("ok", "left out")
    json.dumps(result)


def test_the_head_is_measured_compiled_eagerly_and_with_full_logits(result: dict[str, Any]) -> None:
    rows = result["sections"]["head"]["rows"]
    for dtype, worst in (("float32", 1e-5), ("bfloat16", 1e-5)):
        for variant in ("compiled", "torch"):
            row = rows[f"{variant}, {dtype}"]
            assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
            assert row["logp_error"] < worst
            assert row["d_weight_error_norm"] < (1e-5 if dtype == "float32" else 1e-2)
        assert rows[f"full logits, {dtype}"]["peak_mib"] > rows[f"torch, {dtype}"]["peak_mib"] > 0
    assert rows["full logits, bfloat16"]["logp_error"] > 1e-3, "full logits round, which shows that errors are measured"


def test_the_training_sections_report_speed_sync_and_check(result: dict[str, Any]) -> None:
    quickstart = result["sections"]["quickstart"]["rows"]["quickstart"]
    fsdp2 = result["sections"]["fsdp2"]["rows"]["fsdp2"]
    for row in (quickstart, fsdp2):
        assert row["iterations_after_the_first"] == 1
        for name in ("time/sync_s", "time/verify_s", "tokens_per_second/generate", "tokens_per_second/update"):
            assert row[name] > 0
        assert row["update_flops_per_s"] == pytest.approx(row["update_flops_per_s"])
        assert row["sync/logp_difference_max"] < 1
    assert quickstart["optimizer_steps"] == 4
    assert fsdp2["rollout/length"] == 6
    assert fsdp2["sleep_s"] >= 0
    assert "not in the table" in fsdp2["share_of_peak"]


def test_the_table_has_every_section_and_figure(result: dict[str, Any]) -> None:
    text = gpu_check.table(result)
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == list(gpu_check.SECTIONS)
    assert any(line.split()[0] == "time/update_s" for line in lines if line.startswith("  "))
    (head,) = (line for line in lines if "ms_low" in line)
    assert "d_weight_error_max" in head
    assert any(line.startswith("  compiled, bfloat16") for line in lines)


def run(name: str, tmp_path: Path, *, limit_s: float = 100.0, left_s: float = 400.0, needs: str | None = None) -> Any:
    return gpu_check.run(name, gpu_check.Section(limit_s, needs), tmp_path, True, left_s)


def test_what_is_not_installed_is_left_out_by_name(tmp_path: Path) -> None:
    outcome = run("vllm", tmp_path, needs="no_such_package")
    assert outcome == {"status": "left out", "reason": "no_such_package is not installed", "rows": {}}


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert run("vllm", tmp_path, needs="no_such_package")["status"] == "left out"
    assert gpu_check.installed("torch")


def test_a_section_that_fails_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_from(gpu_check, monkeypatch)
    outcome = run("no_such_section", tmp_path)
    assert outcome["status"] == "failed"
    assert "no_such_section" in outcome["reason"]
    assert outcome["log_end"]
    assert "no_such_section: failed" in gpu_check.table({"sections": {"no_such_section": outcome}})


def test_a_section_that_takes_too_long_is_stopped_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").mkdir()
    script = tmp_path / "gpu_section"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        'pathlib.Path(sys.argv[2]).write_text(\'{"first": {"ms": 1.5}}\')\n'
        "time.sleep(600)\n"
    )
    started = gpu_check.subprocess.Popen
    monkeypatch.setattr(
        gpu_check.subprocess,
        "Popen",
        lambda command, **others: started([sys.executable, str(script), *command[3:]], **others),
    )
    ready = tmp_path / "slow" / "rows.json"
    looked_at = gpu_check.os.waitid

    def until_ready(*arguments: Any) -> Any:
        """The limit counts from when there is something to keep, however busy the machine is."""
        while not ready.exists() or not ready.read_text():
            gpu_check.time.sleep(0.01)
        return looked_at(*arguments)

    monkeypatch.setattr(gpu_check.os, "waitid", until_ready)
    outcome = run("slow", tmp_path, limit_s=0.1)
    assert outcome["status"] == "stopped"
    assert outcome["rows"] == {"first": {"ms": 1.5}}
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":  # killed, perhaps not reaped yet
        gpu_check.time.sleep(0.01)


def test_no_section_starts_when_the_time_is_used_up(tmp_path: Path) -> None:
    assert run("head", tmp_path, left_s=0.0)["status"] == "left out"
    assert gpu_check.TOTAL_S < 8 * 60


def test_without_a_gpu_the_full_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"status": "ok", "rows": {"machine": {"device": "CPU (x86_64)"}}}
    monkeypatch.setattr(gpu_check, "run", lambda *_: machine)
    with pytest.raises(SystemExit, match="--miniature"):
        gpu_check.check(["head"], False, tmp_path)


def test_an_error_in_a_row_leaves_the_others(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "rows.json")
    with figures.guarded("first") as row:
        row["ms"] = 1.0
        raise ValueError("no kernel\nfor this device")
    with figures.guarded("second") as row:
        row["ms"] = 2.0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == {"first": {"ms": 1.0, "failed": "ValueError: no kernel"}, "second": {"ms": 2.0}}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_device_by_name(name: str, peak: float | None) -> None:
    assert hardware.peak_flops(name) == peak

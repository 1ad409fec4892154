"""The part of ``benchmarks/gpu_check.py`` that needs vLLM, in miniature."""

from __future__ import annotations

from pathlib import Path

import gpu_check


def test_the_gpu_check_trains_sharded_with_vllm_and_reports_sync_check_sleep_and_wake(tmp_path: Path) -> None:
    outcome = gpu_check.run("vllm", gpu_check.SECTIONS["vllm"], tmp_path, True, 400.0)
    assert outcome["status"] == "ok", outcome
    row = outcome["rows"]["vllm"]
    for name in ("time/sync_s", "time/verify_s", "tokens_per_second/generate", "tokens_per_second/update", "wake_s"):
        assert row[name] > 0
    assert 0 < row["sync/logp_difference_max"] < 1

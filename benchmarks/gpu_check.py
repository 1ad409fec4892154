"""What only a GPU can show, in one command of at most eight minutes on one GPU; prints one table and one JSON.

    python benchmarks/gpu_check.py [--json gpu_check.json] [--sections head vllm] [--folder FOLDER]
    python benchmarks/gpu_check.py --miniature        # the same code on a CPU, in sizes that take seconds

- head: the fused head's compiled arithmetic against its eager one and against full logits;
- quickstart: the warm start and 30 iterations of the quick start;
- fsdp2: a 0.5B Qwen2 with random weights in bfloat16, sharded, with the embedded engine;
- vllm: the same with vLLM: generation, sleep and wake, sync, check.

Every section runs in a process of its own, with a time limit. One that fails, takes too long or lacks a package is
named with the reason, keeps the figures it has, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL_S = 470.0


@dataclass(frozen=True)
class Section:
    """A part of the check: its time limit in seconds, and a package that it needs beyond ours."""

    limit_s: float
    needs: str | None = None


SECTIONS = {
    "machine": Section(40),
    "head": Section(110),
    "quickstart": Section(120),
    "fsdp2": Section(120),
    "vllm": Section(170, needs="vllm"),
}


def run(name: str, section: Section, folder: Path, miniature: bool, left_s: float) -> dict[str, Any]:
    """One section's outcome: ``status`` (ok, failed, stopped, left out), ``reason``, ``seconds`` and ``rows``."""
    if section.needs and not installed(section.needs):
        return {"status": "left out", "reason": f"{section.needs} is not installed", "rows": {}}
    limit = min(section.limit_s, left_s)
    if limit <= 0:
        return {"status": "left out", "reason": f"the check's {TOTAL_S:g} s were used up", "rows": {}}
    file, log = folder / name / "rows.json", folder / f"{name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu.section", name, str(file), *(["miniature"] if miniature else [])]
    start = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(
            command, env=environment(miniature), cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
        code = wait(child, limit)
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    outcome: dict[str, Any] = {"status": "ok", "seconds": time.perf_counter() - start, "rows": rows}
    if code is None:
        return outcome | {"status": "stopped", "reason": f"took more than {limit:.0f} s"}
    reasons = [f"{row}: {figures['failed']}" for row, figures in rows.items() if "failed" in figures]
    if code or reasons:
        end = log.read_text(errors="replace").splitlines()
        reasons = reasons or [f"exit code {code}: {end[-1] if end else 'no output'}"]
        return outcome | {"status": "failed", "reason": "; ".join(reasons), "log_end": end[-15:]}
    return outcome


def installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of that name on the path is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def environment(miniature: bool) -> dict[str, str]:
    """Our source tree first; one CPU thread in a miniature; nothing from the network."""
    paths = [str(HERE.parent / "src"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return os.environ | own | ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if miniature else {})


def wait(child: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None if the section ran out of time. Whatever it has started ends with it, vLLM's workers too."""
    deadline, ended = time.monotonic() + limit_s, None
    while ended is None and time.monotonic() < deadline:
        time.sleep(0.05)
        # Looked at, not taken: until it is, no other process can get the number of its group.
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    return None if ended is None else code


def table(result: dict[str, Any]) -> str:
    """Every section with its status and its figures: one a line, or a line per row where it has several rows."""
    lines = []
    for name, outcome in result["sections"].items():
        reason = f" - {outcome['reason']}" if "reason" in outcome else ""
        taken = f" in {outcome['seconds']:.0f} s" if "seconds" in outcome else ""
        lines.append(f"{name}: {outcome['status']}{taken}{reason}")
        rows = outcome["rows"]
        if len(rows) == 1:
            lines += [f"  {label:34}{shown(value)}" for label, value in next(iter(rows.values())).items()]
        elif rows:
            labels = list(dict.fromkeys(label for row in rows.values() for label in row if label != "failed"))
            lines.append(f"  {'':22}" + "".join(f"{label:>{len(label) + 3}}" for label in labels))
            lines += [f"  {name:22}{_cells(row, labels)}" for name, row in rows.items()]
    return "\n".join(lines)


def _cells(row: dict[str, Any], labels: Sequence[str]) -> str:
    return "".join(f"{shown(row[label]) if label in row else '-':>{len(label) + 3}}" for label in labels)


def shown(value: Any) -> str:
    """A figure in four digits, or text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def check(sections: Sequence[str], miniature: bool, folder: Path) -> dict[str, Any]:
    start, outcomes = time.perf_counter(), dict[str, Any]()
    for name in [name for name in SECTIONS if name == "machine" or name in sections]:
        left = TOTAL_S - (time.perf_counter() - start)
        outcomes[name] = run(name, SECTIONS[name], folder, miniature, left)
        print(f"{name}: {outcomes[name]['status']}", flush=True)
        on_cpu = outcomes[name]["rows"].get("machine", {}).get("device", "").startswith("CPU")
        if name == "machine" and on_cpu and not miniature:
            raise SystemExit("there is no GPU that torch can use here: --miniature runs the same code on a CPU")
    return {"miniature": miniature, "seconds": time.perf_counter() - start, "sections": outcomes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SECTIONS if name != "machine"]
    parser.add_argument("--miniature", action="store_true", help="tiny sizes on a CPU: shows that it runs, no figures")
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, help="write the JSON here rather than below the table")
    parser.add_argument("--folder", type=Path, help="keeps runs and logs; by default a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        result = check(options.sections, options.miniature, folder)
    print(f"\n{table(result)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    if any(outcome["status"] in ("failed", "stopped") for outcome in result["sections"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

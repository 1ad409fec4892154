"""Programs judged by unit tests, in a locked-down process (see :mod:`.sandbox`)."""

from __future__ import annotations

import hashlib
from typing import Literal

from ibro_lightning.errors import check_instance
from ibro_lightning.rewards.base import Verdict, VerifiableReward
from ibro_lightning.rewards.code.limits import CHECK_S, DEFAULT_LIMITS, SandboxLimits
from ibro_lightning.types import Completion, Prompt, check_choice

OpenTests = Literal["refuse", "run"]
_FENCE = "```"
_PYTHON = ("python", "py", "python3")
_SLACK_S = 5.0


class CodeReward(VerifiableReward):
    """Runs the response's Python program against the problem's unit tests: right if it passes all of them.

    The program is the last closed ````` ```python ````` block of the response, or the last unlabelled block if there
    is none. ``prompt.answer`` is, as a mapping or as JSON text, one of

    - ``{"tests": ["assert f(1) == 2", …], "setup": "import math", "entry_point": "f"}`` for functions. ``setup``
      (optional) runs before the response and is visible to it: imports and helpers, no reference solution.
      ``entry_point`` is needed only if the tested function has a builtin's name;
    - ``{"inputs": ["1 2\\n", …], "outputs": ["3\\n", …]}`` for programs that read stdin and print. Outputs are compared
      without trailing whitespace on each line and without empty lines at the end; the program must exit with code 0;
    - ``{"fn_name": "add", "inputs": [[1, 2], …], "outputs": [3, …]}`` for a function, or a method of a class
      ``Solution``, that is called with each input's arguments and returns the output (LiveCodeBench, APPS, TACO: see
      :mod:`.calls`); ``{"metadata": {"func_name": "add"}, …}`` is the same. ``setup`` is optional and by default
      has the usual imports of such problems.

    Guarantee: expected outputs, and the values that an assert compares with, never enter the process that runs the
    response, and are compared in one that has not run it. Only plain data passes between the two (None, numbers,
    strings, lists, tuples, sets, dictionaries, deques). So exit codes, faked output, overridden ``__eq__`` and
    builtins, and tampering with the interpreter gain nothing: a response must compute the values. It can still
    hard-code those that its prompt shows. Asserts that cannot be taken apart (loops around asserts, functions passed
    to checkers, caught exceptions: see :mod:`.unit_tests`) have no such guarantee and are refused unless
    ``open_tests`` is "run".

    Args:
        fenced: read a fenced block; False takes the whole response as the program.
        partial: the accuracy is the share of tests passed, instead of 1 for all of them and 0 otherwise.
        limits: for wall time, of one response's tests together; otherwise of each process.
        open_tests: "run" judges tests that cannot be taken apart by whether they finish in the response's own process,
            which a malicious response can fake.
    """

    tells_bad_answers = True

    def __init__(
        self,
        fenced: bool = True,
        partial: bool = False,
        limits: SandboxLimits = DEFAULT_LIMITS,
        open_tests: OpenTests = "refuse",
        correct: float = 1.0,
        incorrect: float = -1.0,
    ) -> None:
        super().__init__(correct, incorrect)
        check_instance("limits", limits, SandboxLimits)
        check_choice("open_tests", open_tests, OpenTests)
        self.fenced, self.partial, self.limits, self.open_tests = fenced, partial, limits, open_tests
        self.deadline_s = limits.wall_s + CHECK_S + _SLACK_S  # for the pool; the sandbox has its own limit

    def preload(self) -> None:
        import ibro_lightning.rewards.code.execution  # noqa: F401  here, since other rewards run no programs

    def verify(self, prompt: Prompt, completion: Completion) -> Verdict:
        from ibro_lightning.rewards.code.execution import tests_passed
        from ibro_lightning.rewards.code.problem import read_problem

        problem = read_problem(prompt, self.open_tests == "run")
        program = last_program(completion.text) if self.fenced else completion.text
        if not program.strip():
            return Verdict(0.0, "")
        passed = tests_passed(prompt, problem, program, self.limits, stop_early=not self.partial)
        digest = hashlib.sha256(program.strip().encode("utf-8", "replace")).hexdigest()[:16]
        return Verdict(passed / problem.count if self.partial else float(passed == problem.count), digest)


def last_program(text: str) -> str:
    """The last closed fenced block that is labelled as Python; without one, the last unlabelled one; or ""."""
    last: dict[bool, str] = {}
    label: str | None = None
    block: list[str] = []
    for line in text.split("\n"):
        stripped = line.strip()
        if not stripped.startswith(_FENCE):
            block.append(line)
        elif label is None:
            label, block = stripped[len(_FENCE) :].strip().lower(), []
        else:
            if label in ("", *_PYTHON):
                last[label != ""] = "\n".join(block)
            label = None
    return last.get(True, last.get(False, ""))

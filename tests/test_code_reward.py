"""The code reward: right programs pass, and no program fools the tests."""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if sys.platform != "linux":
    pytest.skip("the sandbox needs Linux", allow_module_level=True)

from helpers.leftovers import nothing_is_left  # noqa: F401  an autouse fixture
from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.rewards import PoolOptions, RewardPool, judge_all
from ibro_lightning.rewards.code import in_sandbox, sandbox, sandbox_host
from ibro_lightning.rewards.code.reward import CodeReward, last_program
from ibro_lightning.rewards.code.sandbox import SandboxLimits, run_python
from ibro_lightning.rewards.code.unit_tests import OpenTest, TestParts, take_apart, trusted_names
from ibro_lightning.types import Completion, Prompt

A_SECOND = SandboxLimits(wall_s=20.0, cpu_s=1, memory_mib=256)
"""A second of work; on a busy machine that takes its time."""
DOUBLE = {"tests": ["assert f(2) == 4", "assert f(0) == 0", "assert f(-1.5) == -3"]}


def judge(program: str, answer: Any, *, fence: bool = True, **options: Any) -> float:
    options.setdefault("limits", A_SECOND)
    text = f"Here it is.\n```python\n{program}\n```\nDone." if fence else program
    completion = Completion((1,), (0.0,), "stop", text, 64, 0)
    (result,) = CodeReward(**options)(Prompt("apps/7", "text", (1,), answer), [completion])
    return result.parts["accuracy"]


def test_right_and_wrong_functions() -> None:
    assert judge("def f(x): return 2 * x", DOUBLE) == 1.0
    assert judge("def f(x): return x * x", DOUBLE) == 0.0
    assert judge("def f(x): return x * x", DOUBLE, partial=True) == pytest.approx(2 / 3, abs=1e-12)
    assert judge("def f(x)", DOUBLE, partial=True) == 0.0
    assert judge("def g(x): return 2 * x", DOUBLE) == 0.0
    assert judge("def f(x): return 2 * x\nraise ValueError", DOUBLE) == 0.0
    assert judge("def f(x):\n  if x < 0:\n    while True: pass\n  return 2 * x", DOUBLE, partial=True) == pytest.approx(
        2 / 3
    )
    assert judge("print('debug')\ndef f(x): print(x); return 2 * x\nif __name__ == '__main__': input()", DOUBLE) == 1.0


KINDS = [
    (
        "def f(): return [1, (2.5, 'a\\n'), {'b': {3}}, None, True, b'c', 1j, frozenset({4})]",
        "assert f() == [1, (2.5, 'a\\n'), {'b': {3}}, None, True, b'c', 1j, {4}]",
    ),
    (
        "import collections as c\ndef f(): return [c.Counter('aab'), c.deque([1]), c.OrderedDict(x=1)]",
        "import collections\nassert f() == [{'a': 2, 'b': 1}, collections.deque([1]), {'x': 1}]",
    ),
    (
        "from fractions import Fraction\ndef f(): return Fraction(1, 3)",
        "from fractions import Fraction as F\nassert f() == F(2, 6)",
    ),
    ("def f(): return float('inf')", "assert f() == float('inf')"),
    ("def f(): return float('nan')", "import math\nassert math.isnan(f())"),
    ("def f(x): return x + 0.1", "assert abs(f(0.2) - 0.3) < 1e-9"),
    ("def sort(xs): xs.sort()", "xs = [3, 1]\nsort(xs)\nassert xs == [1, 3]"),
    (
        "class S(list):\n  def top(self): return self[-1]",
        "s = S()\nfor i in range(3):\n  s.append(i)\nassert s.top() == 2\nassert s.pop() == 2 and len(s) == 2",
    ),
    ("def f(x): return x > 2", "assert f(3) and not f(1)\nassert f(2) is False"),
    ("def f(x): return None if x else 5", "assert f(1) is None or f(1)[0] == 7"),
    ("def f(x): return -x", "xs = [1, 2]\nassert sorted(f(x) for x in xs) == [-2, -1]"),
    ("def f(x): return -x", "xs = [1, 2]\nassert {f(x): 0 for x in xs} == {-1: 0, -2: 0}"),
    ("def f(x): return x", "want = [1, [2]]\nassert f([1, [2]]) == want, 'wrong'"),
    ("import enum\nclass E(str, enum.Enum):\n  A = 'a'\ndef f(): return E.A", "assert f() == 'a'"),
    ("def f(input): return sum(input)", "input = [1, 2]\nassert f(input) == 3"),
]


@pytest.mark.parametrize(("program", "test"), KINDS)
def test_kinds_of_tests_and_values(program: str, test: str) -> None:
    assert judge(program, {"tests": [test]}) == 1.0
    assert judge("def f(*x): return 'other'\nS = sort = f", {"tests": [test]}) == 0.0


EQUAL_TO_ALL = (
    "class E:\n  def __eq__(s, o): return True\n  def __sub__(s, o): return 0\n  __rsub__ = __sub__\n"
    "  def __abs__(s): return 0\n  def __float__(s): return 0.0\n  def __getattr__(s, n): return lambda *a: s\n"
    "def f(x): return E()\n"
)
SEARCHES = (  # in all frames and all objects, for the number that f(2) is compared with
    "import gc, re, sys\ndef f(x):\n  frame, found = sys._getframe(), []\n  while frame:\n"
    "    found += map(repr, frame.f_locals.values())\n    frame = frame.f_back\n"
    "  found += [str(o) for o in gc.get_objects() if isinstance(o, (str, bytes, list, tuple, dict))]\n"
    "  n = re.findall(r'f.2.[, ]*(?:==|-) *([0-9]+)', ' '.join(found))\n  return int(n[0]) if n else 0"
)
FAKES = "setup\\nright 0\\nright 1\\nok\\nPASSED\\nvalue 0 0 True\\nvalue 1 0 None\\nvalue 2 0 _value_0\\n"
EVAL = "value 0 0 __import__('os').write(3, b'right 0')\\n"
TRICKS = {
    "sys.exit at the start": "import sys; sys.exit(0)",
    "os._exit at the start": "import os; os._exit(0)",
    "SystemExit in tests": "def f(x): raise SystemExit(0)",
    "os._exit in tests": "import os\ndef f(x): os._exit(0)",
    "objects equal to all": EQUAL_TO_ALL,
    "a number equal to all": "class I(int):\n  def __eq__(s, o): return True\ndef f(x): return I(7)",
    "a string's repr": "class R(str):\n  def __repr__(s): return '314159'\n  __str__ = __repr__\ndef f(x): return R()",
    "a list's repr": "class L(list):\n  def __repr__(s): return '314159'\ndef f(x): return L()",
    "other helpers": "import math\nmath.isclose = lambda *a: True\nabs = lambda x: 0\n" + EQUAL_TO_ALL,
    "another eval": "import builtins\nbuiltins.eval = builtins.all = lambda *a: True\n" + EQUAL_TO_ALL,
    "fake reports": f"import os\nfor fd in (1, 2, 3): os.write(fd, b'{FAKES}')\nos._exit(0)",
    "code as a value": f'import os\nos.write(3, b"{EVAL}")\ndef f(x): os._exit(0)',
    "searches for the tests": SEARCHES,
    "traces": "import sys\ndef t(f, e, a): f.f_locals['value'] = 1; return t\nsys.settrace(t)\ndef f(x): return 0",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(3, b'right 0\\nright 1\\n'))\ndef f(x): return 0",
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_does_not_pass(name: str) -> None:
    tests = ["assert f(2) == 314159", "assert math.isclose(f(2), 314159.0)", "assert abs(f(2) - 314159) < 1"]
    assert judge(TRICKS[name], {"setup": "import math", "tests": tests}, partial=True) == 0.0


def test_the_search_does_find_what_enters_its_process() -> None:
    """So that its failure above says something; and this is what ``open_tests: run`` cannot prevent."""
    open_test = {"tests": ["for n in (1, 2):\n  assert n == 1 or f(2) == 314159"]}
    assert judge(SEARCHES, open_test, open_tests="run") == 1.0


def test_expected_values_never_enter_the_programs_process(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []

    def spy(program: str, **options: Any) -> sandbox.SandboxResult:
        programs.append(program)
        return run_python(program, **options)

    monkeypatch.setattr("ibro_lightning.rewards.code.execution.run_python", spy)
    tests = ["want = 314159\nassert f(2) == want", "assert abs(f(2) - 314159) < 1", "assert f(2) in (1, 314159)"]
    assert judge("def f(x): return 314159 + 0 * x", {"tests": tests}) == 1.0
    with_response, without = programs
    assert with_response.count("314159") == 1  # the response's own
    assert "def f" in with_response
    assert "def f(x)" not in without


def test_programs_with_stdin_and_stdout() -> None:
    answer = {"inputs": ["1 2\n", "3\n4"], "outputs": ["3\n", "7"]}
    assert judge("import sys\nprint(sum(map(int, sys.stdin.read().split())), ' \\n\\n')", answer) == 1.0
    assert judge("print(3)", answer) == 0.0
    assert judge("print(3)", answer, partial=True) == 0.5
    assert judge("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)", answer) == 0.0
    assert judge("print(' 3')", {"inputs": [""], "outputs": ["3"]}) == 0.0
    assert judge("print('3\\n\\n4')", {"inputs": [""], "outputs": ["3\n4"]}) == 0.0
    assert judge("print(input())", '{"inputs": ["5"], "outputs": ["5"]}') == 1.0  # as JSON text


ADD = {"fn_name": "add", "inputs": [[1, 2], [[3], [4]]], "outputs": [3, [3, 4]]}
LINES = {"fn_name": "add", "inputs": ["1\n2", "[3]\n[4]\n"], "outputs": ["3", "[3, 4]"]}


@pytest.mark.parametrize(
    "answer", [ADD, LINES, json.dumps(ADD), json.dumps(LINES)], ids=["list", "lines", "json", "json"]
)
def test_functions_are_called_with_the_inputs(answer: Any) -> None:
    """As a program that reads stdin and prints, every one of these fails."""
    assert judge("def add(a, b): return a + b", answer) == 1.0
    assert judge("class Solution:\n  def add(self, a, b): return a + b", answer) == 1.0
    assert judge("class Solution: pass\ndef add(a, b): return a + b\nprint('debug')", answer) == 1.0
    assert judge("def add(a, b): return 3", answer) == 0.0
    assert judge("def add(a, b): return 3", answer, partial=True) == 0.5
    assert judge("def add(a, b):\n  if a == 1: raise SystemExit\n  return a + b", answer, partial=True) == 0.5
    assert judge("def plus(a, b): return a + b", answer) == 0.0
    assert judge("print(3)", answer) == 0.0


CALLS = [
    ("def f(xs: List[int]) -> int: return Counter(xs).most_common(1)[0][0]", [[[1, 1, 2]]], [1], 1.0),
    ("def f(): return (1, (2, 3))", [[]], [[1, [2, 3]]], 1.0),
    ("def f(): return {1: [2.0]}", [[]], [{"1": [2]}], 1.0),
    ("def f(): return 0.1 + 0.2", [[]], [0.3], 1.0),
    ("def f(): return 0.31", [[]], [0.3], 0.0),
    ("def f(): return 'a'", [[]], ["a"], 1.0),
    ("def f(): return None", [[]], [None], 1.0),
    ("def f(): return '1'", [[]], [1], 0.0),
    ("def f(): return [1]", [[]], [[[1]]], 1.0),  # APPS wraps what is returned
    ("def f(): return 2", [[]], [[1]], 0.0),
    ("def f(xs): xs.append(1); return xs", [[[0]], [[0]]], [[0, 1], [0, 1]], 1.0),
    ("def f(x): return x", ['"a\\nb"', "null", "{}"], ['"a\\nb"', "null", "{}"], 1.0),
    ("def f(x): return [x]", ["1"], ["1"], 0.0),
    ("class A:\n  def __eq__(self, other): return True\ndef f(): return A()", [[]], [1], 0.0),
    ("class L(list):\n  def __eq__(self, other): return True\ndef f(): return L([7])", [[]], [[1, 2]], 0.0),
]


@pytest.mark.parametrize(("program", "inputs", "outputs", "expected"), CALLS)
def test_what_functions_return_is_compared(program: str, inputs: Any, outputs: Any, expected: float) -> None:
    assert judge(program, {"fn_name": "f", "inputs": inputs, "outputs": outputs}) == expected


def test_a_setup_of_ones_own_is_in_place_of_the_usual_imports() -> None:
    answer = {"fn_name": "f", "inputs": [[2]], "outputs": [6], "setup": "def three(): return 3"}
    assert judge("def f(x): return x * three()", answer) == 1.0
    assert judge("def f(x: List[int]): return x * three()", answer) == 0.0


def test_expected_values_of_calls_never_enter_the_programs_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def watching(program: str, **settings: Any) -> Any:
        ran.append(program)
        return run_python(program, **settings)

    monkeypatch.setattr("ibro_lightning.rewards.code.execution.run_python", watching)
    assert judge("def f(x): return 123450000 + x", {"fn_name": "f", "inputs": [[6789]], "outputs": [123456789]}) == 1.0
    observed, checked = ran
    assert "123456789" not in observed
    assert "123456789" in checked
    assert "def f(x)" not in checked


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"fn_name": "f", "inputs": ["1 2"], "outputs": ["3"]}, "input 1 is text, and '1 2' no JSON"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["three"]}, "output 1 is text, and 'three' no JSON"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "input 1 must be a list of arguments"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": []}, "outputs must be a list of at least one"),
        ({"fn_name": "f", "inputs": [[1], [2]], "outputs": [1]}, "2 inputs for 1 outputs"),
        ({"fn_name": "f", "outputs": [1]}, "inputs must be a list"),
        ({"fn_name": "f g", "inputs": [[1]], "outputs": [1]}, "fn_name must be the name of a function"),
        ({"fn_name": 7, "inputs": [[1]], "outputs": [1]}, "fn_name must be the name of a function"),
        ({"fn_name": "f", "inputs": [[float("nan")]], "outputs": [1]}, "input 1 holds nan"),
        ({"fn_name": "f", "inputs": [[{1}]], "outputs": [1]}, "input 1 holds a set"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [1], "setup": "import"}, "invalid syntax"),
        ({"func_name": "f", "inputs": ["1"], "outputs": ["1"]}, "func_name beside inputs and outputs"),
        ({"entry_point": "f", "inputs": ["1"], "outputs": ["1"]}, "entry_point beside inputs and outputs"),
        ({"function": "f", "inputs": ["1"], "outputs": ["1"]}, "function beside inputs and outputs"),
        ({"func": "f", "inputs": ["1"], "outputs": ["1"]}, "func beside inputs and outputs"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [1], "timeout": 3}, "timeout beside inputs and outputs"),
        ({"setup": "x = 1", "inputs": ["1"], "outputs": ["1"]}, "setup beside inputs and outputs"),
        ({"metadata": {"function": "f"}, "inputs": ["1"], "outputs": ["1"]}, "its metadata has function"),
        ({"metadata": "func_name", "inputs": ["1"], "outputs": ["1"]}, "its metadata is a text, but no JSON"),
        ({"metadata": "[1]", "inputs": ["1"], "outputs": ["1"]}, "its metadata is list"),
        (
            {"metadata": {"func_name": "g"}, "fn_name": "f", "inputs": [[1]], "outputs": [1]},
            "two functions, 'f' and 'g'",
        ),
    ],
)
def test_calls_that_cannot_be_made_are_errors_that_name_the_prompt(answer: Any, words: str) -> None:
    with pytest.raises(RewardError, match="apps/7") as refused:
        judge("", answer)
    assert words in str(refused.value)


def test_without_a_functions_name_inputs_are_stdin() -> None:
    for beside in ({"fn_name": None}, {"metadata": '{"func_name": null}'}, {"metadata": {}, "function": None}):
        answer = {**beside, "inputs": ["1 2\n"], "outputs": ["3\n"]}
        assert judge("print(sum(map(int, input().split())))", answer) == 1.0


@pytest.mark.parametrize("metadata", [{"func_name": "add"}, '{"func_name": "add"}', {"func_name": "add", "level": 3}])
def test_live_code_bench_names_the_function_in_its_metadata(metadata: Any) -> None:
    answer = {"metadata": metadata, "inputs": ["1\n2"], "outputs": ["3"]}
    assert judge("class Solution:\n  def add(self, a, b): return a + b", answer) == 1.0
    assert judge("print(3)", answer) == 0.0


def test_names_that_solutions_take_for_granted_are_there() -> None:
    program = (
        "def f(n): return [gcd(n, 4), inf > n, int(sqrt(n)), copy.copy([n]), deepcopy([n]), pow(n, 2, 5), "
        "bisect.bisect([1], n), bisect_left([1], n), math.floor(1.5), ceil(1.5), comb(4, 2), Counter('a')['a']]"
    )
    expected = [2, True, 2, [6], [6], 1, 1, 1, 1, 2, 6, 1]
    assert judge(program, {"fn_name": "f", "inputs": [[6]], "outputs": [expected]}) == 1.0


def test_all_inputs_share_one_wall_budget() -> None:
    answer = {"inputs": ["x"] * 50, "outputs": ["y"] * 50}
    limits, started = SandboxLimits(wall_s=1.5, cpu_s=1, memory_mib=256), time.monotonic()
    assert judge("import time; time.sleep(0.4)", answer, partial=True, limits=limits) == 0.0
    assert time.monotonic() - started < 15.0  # 50 programs would sleep for 20 seconds


def test_the_pools_deadline_leaves_room_for_the_sandboxs_own() -> None:
    assert CodeReward(limits=SandboxLimits(wall_s=3.0)).deadline_s == 9.0
    assert CodeReward.pooled
    assert CodeReward.one_by_one


def test_tests_that_cannot_be_taken_apart() -> None:
    tests = ["for i in range(3):\n  assert f(i) == 2 * i", "assert all(f(i) == 2 * i for i in range(3))", "check(f)"]
    setup = "def check(g):\n  assert g(2) == 4"
    right = "def f(x): return 2 * x"
    for test in tests:
        with pytest.raises(RewardError, match=r"'apps/7'.*open_tests: run"):
            judge(right, {"tests": [test], "setup": setup})
    everything = {"tests": [*tests, "assert f(3) == 6"], "setup": setup}
    assert judge(right, everything, open_tests="run") == 1.0
    assert judge("def f(x): return x * x", everything, open_tests="run", partial=True) == pytest.approx(1 / 4)
    assert judge("import sys; sys.exit(0)", everything, open_tests="run", partial=True) == 0.0
    assert (
        judge("import os\ndef f(x):\n  os.write(3, b'0\\n1\\n2\\n')\n  os._exit(0)", everything, open_tests="run")
        == 0.0
    )


def test_a_function_named_like_a_builtin_needs_its_name() -> None:
    tests = ["assert sum(1, 2) == 13"]
    with pytest.raises(RewardError, match="uses nothing that the response defines"):
        judge("def sum(a, b): return a + b + 10", {"tests": tests})
    assert judge("def sum(a, b): return a + b + 10", {"tests": tests, "entry_point": "sum"}) == 1.0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("no json", "no JSON"),
        (7, "int"),
        ({"test": []}, "should have tests"),
        ({"tests": []}, "tests is empty"),
        ({"tests": "assert f(1)"}, "list of texts"),
        ({"tests": [1]}, "list of texts"),
        ({"tests": ["assert f("]}, "cannot be used"),
        ({"tests": ["assert f(1) == 1"], "setup": "import nothing_like_this"}, "setup fails: ModuleNotFoundError"),
        ({"tests": ["assert f(1) == 1"], "setup": 3}, "must be texts"),
        ({"inputs": ["1"]}, "should have tests"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs for 2 outputs"),
    ],
)
def test_broken_problems_are_errors_that_name_the_prompt(answer: Any, words: str) -> None:
    with pytest.raises(RewardError, match="'apps/7'") as error:
        judge("def f(x): return x", answer)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```\n```\nb\n```", "b"),
        ("```python\na\n```\nIt prints\n```\nb\n```", "a"),
        ("```py\na\n```\n  ```Python3\nb\n  c\n  ```", "b\n  c"),
        ("```bash\nrm\n```", ""),
        ("```python\na\n```\n```python\ncut off", "a"),
        ("no code", ""),
        ("```python\n```", ""),
        ("```\n" * 300_001, ""),
    ],
)
def test_the_last_closed_block_is_the_program(text: str, program: str) -> None:
    assert last_program(text) == program


def test_unfenced_and_missing_programs_and_the_reported_answer() -> None:
    assert judge("def f(x): return 2 * x", DOUBLE, fence=False) == 0.0
    assert judge("def f(x): return 2 * x", DOUBLE, fence=False, fenced=False) == 1.0
    one, same, none = (
        CodeReward(limits=A_SECOND)
        .verify(Prompt("p", "", (1,), DOUBLE), Completion((1,), (0.0,), "stop", text, 9, 0))
        .answer
        for text in ("```python\nf = 1\n```", "So:\n```\nf = 1\n\n```", "nothing")
    )
    assert one == same != ""
    assert none == ""
    with pytest.raises(ConfigError, match="open_tests"):
        CodeReward(open_tests="maybe")  # type: ignore[arg-type]


def test_taking_tests_apart() -> None:
    trusted = trusted_names("import math", None)
    assert take_apart("assert f(2) == 4", trusted) == TestParts((("value", "f(2)"),), "", ("_value_0 == 4",))
    assert take_apart("import re\nx = 5\nassert math.isclose(g(re.I).a[1], x)", trusted) == TestParts(
        (("run", "import re"), ("value", "g(re.I).a[1]")), "import re\nx = 5", ("math.isclose(_value_1, x)",)
    )
    for test in (
        "assert map(f, [1])",
        "assert (lambda: f(1))() == 2",
        "try:\n  f(1)\nexcept ValueError:\n  pass",
        "f(1)",
    ):
        with pytest.raises(OpenTest):
            take_apart(test, trusted)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


@given(plain_values)
@settings(max_examples=200, deadline=None)
def test_values_arrive_as_they_are(value: object) -> None:
    arrived = in_sandbox.rebuilt(ast.literal_eval(repr(in_sandbox.plain(value))))
    assert arrived == value
    assert type(arrived) is type(value)


def test_in_the_reward_pool_programs_die_with_a_worker_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    reward = CodeReward(limits=SandboxLimits(wall_s=30.0))
    reward.deadline_s = 1.5  # the pool's comes first here
    texts = ["def f(x): return 2 * x", "import time; time.sleep(99)", "import os\nwhile True: os.fork()", "f = abs"]
    completions = [Completion((1,), (0.0,), "stop", f"```python\n{text}\n```", 64, 0) for text in texts]
    with RewardPool([reward], PoolOptions(workers=2)) as pool:
        (results,) = judge_all(reward, [(Prompt("p", "text", (1,), DOUBLE), completions)], pool)
    assert [result.parts["accuracy"] for result in results] == [1.0, 0.0, 0.0, 0.0]
    assert [result.timed_out for result in results] == [False, True, False, False]
    until = time.monotonic() + 10
    while any(b"sandbox_child.py" in commandline(pid) and here(pid) for pid in os.listdir("/proc") if pid.isdigit()):
        assert time.monotonic() < until
        time.sleep(0.01)
    (left,) = Path(tempfile.gettempdir()).iterdir()  # of the killed worker: removed by a later one
    os.utime(left, (0, 0))
    sandbox_host.sweep()


def commandline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def here(pid: str) -> bool:
    """True if its folder is one of this test's."""
    try:
        return os.readlink(f"/proc/{pid}/cwd").startswith(tempfile.gettempdir())
    except OSError:
        return False

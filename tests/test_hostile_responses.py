"""Ten thousand responses that want to hang, exhaust or crash a verifier: none does, every one is accounted for."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ibro_lightning.rewards import (
    DapoMathReward,
    LastNumberReward,
    MathVerifyReward,
    PoolOptions,
    Reward,
    RewardPool,
    VerifiableReward,
    judge_all,
)
from ibro_lightning.rewards.code.reward import CodeReward
from ibro_lightning.rewards.code.sandbox import SandboxLimits
from ibro_lightning.tasks import CountdownReward
from ibro_lightning.types import Completion, Prompt

DEADLINE_S = 1.5
FRAGMENTS = (
    *("\\boxed{", "}", "{", "$", "$$", "\\(", "\\)", "\\[", "\\]", "\\frac", "\\sqrt", "\\left(", "\\right]", "^", "_"),
    *("\\text{", "\\begin{pmatrix}", "\\end{array}", "&", "\\\\", "Answer:", "**", "=", "\\pm", "\\cup", "\\infty"),
    *("34", "-", "1e999", "0x", "½", "٣", "\\le", "\\pi", "x", "|", "!", "%", "\\circ", ",", "the answer is", "####"),
)


def nested(rng: random.Random) -> str:
    depth = rng.choice((3, 10, 51, 300, 5_000, 100_000) if rng.random() < 0.997 else (30, 49))
    opening, closing = rng.choice(
        [
            ("(", ")"),
            ("{", "}"),
            ("\\frac{1}{", "}"),
            ("\\sqrt{", "}"),
            ("\\boxed{", "}"),
            ("\\left(", "\\right)"),
            ("[", ""),
        ]
    )
    return f"\\boxed{{{opening * depth}1{closing * depth}}}"


def towers(rng: random.Random) -> str:
    n = rng.randint(5, 99999)
    return rng.choice(
        (
            f"\\boxed{{{n}^{{{n}^{{{n}^{{{n}}}}}}}}}",
            f"$10^{{{n * 10**5}}}$",
            f"Answer: {n}**{n}**{n}",
            f"\\boxed{{({n}^{{{n}}})^{{{n}}} \\mod 7}}",
            f"\\boxed{{\\sqrt[{n}]{{{n}^{{{n * 1000}}}}}}}",
            f"\\boxed{{2^{{2^{{2^{{2^{{2^{{2^{{{n}}}}}}}}}}}}}}}",
        )
    )


def factorials(rng: random.Random) -> str:
    n = rng.randint(10**3, 10**7)
    return rng.choice(
        (f"\\boxed{{{n}!}}", f"\\boxed{{(({n}!)!)!}}", f"$\\frac{{{n}!}}{{{n - 1}!}}$", f"Answer: {n}!!!!")
    )


def unbalanced(rng: random.Random) -> str:
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 200)))


def long_expressions(rng: random.Random) -> str:
    n = rng.choice((10, 25) if rng.random() < 0.99 else (400, 3_000))
    return rng.choice(
        (
            "\\boxed{" + "+".join(f"x_{{{i}}}" for i in range(n)) + "}",
            "\\boxed{\\{" + ",".join(map(str, range(n))) + "\\}}",
            "\\boxed{" + "\\cup".join(f"({i},{i + 2})" for i in range(n)) + "}",
            "\\boxed{\\begin{pmatrix}" + "&".join(["1"] * n) + "\\end{pmatrix}}",
            "$" + "=".join(map(str, range(n))) + "$",
            "Answer: " + "1+" * n + "1",
            "\\boxed{" + "(x+1)" * n + "}",
        )
    )


def control_characters(rng: random.Random) -> str:
    odd = "\x00\x01\x08\x1b\x7f\u200b\u202e\u2028\ufeff\ud800\U0010ffff\r\n\t"
    said = "".join(rng.choice(odd) for _ in range(rng.randint(1, 500)))
    return f"{said}Answer:{said}3{said}4{said}\\boxed{{{said}34{said}}}{said}"


def repetitions(rng: random.Random) -> str:
    piece = rng.choice(
        ("Answer:", "Answer: ", "$", "\\boxed{", "\\text{", " ", "\n", "=", "****", "a ", "\\frac", "<|x|>")
    )
    return piece * rng.choice((1_000, 20_000, 50_000))


def digits(rng: random.Random) -> str:
    return rng.choice(("Answer: ", "\\boxed{", "", "0.", "1e", "-")) + rng.choice("0179") * rng.choice(
        (5_000, 1_000_000)
    )


KINDS: dict[Callable[[random.Random], str], int] = {
    nested: 1800,
    towers: 1800,
    factorials: 1500,
    unbalanced: 2400,
    long_expressions: 200,
    control_characters: 1700,
    repetitions: 360,
    digits: 50,
}
HANGS = ("\\boxed{\\binom{1000000000}{500000000}}", "\\boxed{\\sum_{i=1}^{10^{9}} i^i}")
"""What math-verify's parser evaluates for ever; 6 of each."""


def mathematical() -> list[str]:
    rng = random.Random(5)
    texts = [kind(rng) for kind, count in KINDS.items() for _ in range(count)] + [*HANGS] * 6
    rng.shuffle(texts)
    return texts


PROGRAMS = (
    "while True: pass",
    "import os\nwhile True: os.fork()",
    "import subprocess\nwhile True: subprocess.Popen(['sleep', '100'])",
    "import threading\nwhile True: threading.Thread(target=lambda: None).start()",
    "x = []\nwhile True: x.append('x' * 10**7)",
    "while True: print('x' * 10**6)",
    "i = 0\nwhile True:\n    i += 1\n    open(f'file{i}', 'w').write('x' * 10**6)",
    "import time\ntime.sleep(1000)",
    "10 ** 10 ** 9",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "import ctypes\nctypes.string_at(0)",
    "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
    "import signal\nfor s in (1, 2, 3, 6, 13, 14, 15):\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "(" * 10_000,
)


def ask(texts: list[str], answer: object) -> list[tuple[Prompt, list[Completion]]]:
    prompt = Prompt("hostile", "", (1,), answer)
    completions = [Completion((1,), (0.0,), "stop", text, 20480, seed) for seed, text in enumerate(texts)]
    return [(prompt, completions[start : start + 16]) for start in range(0, len(completions), 16)]


class Watch:
    """Largest resident set of any worker, growth of this process, and the longest time for which the machine gave this
    process no turn (another thread of it, to which the pool's waiting is no obstacle, asks for one every 10 ms)."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool, self.worker, self.stall_s, self._done = pool, 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._before = resident(os.getpid())
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = resident(os.getpid()) - self._before

    def _watch(self) -> None:
        while not self._done.is_set():
            self.worker = max([self.worker, *map(resident, self.pool.worker_pids)])
            asleep = time.monotonic()
            time.sleep(0.01)
            self.stall_s = max(self.stall_s, time.monotonic() - asleep - 0.01)


def resident(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def check_all(reward: Reward, texts: list[str], answer: object, workers: int = 2) -> tuple[Counter[str], RewardPool]:
    """Judge them all; what became of them, with the promises that hold for any reward checked."""
    deadline = reward.deadline_s or DEADLINE_S
    pool = RewardPool([reward], PoolOptions(workers=workers, deadline_s=DEADLINE_S, memory_mib=400))
    with pool, Watch(pool) as watch:
        results = [result for row in judge_all(reward, ask(texts, answer), pool) for result in row]
        (((after,),)) = judge_all(reward, ask(["Answer: 34 \\boxed{34} 34"], answer), pool)  # it is alive
    assert not after.timed_out
    assert len(results) == len(texts)
    stopped = sum(result.timed_out for result in results)
    assert stopped == sum(pool.counts.values())
    assert all(result.parts["accuracy"] == 0.0 for result in results if result.timed_out)
    print(f"{len(texts)} responses, {stopped} stopped, longest {pool.longest_s:.3f} s, stall {watch.stall_s:.3f} s")
    print(f"largest worker {watch.worker / 2**20:.0f} MiB, growth here {watch.growth / 2**20:.0f} MiB")
    assert pool.longest_s < 1.2 * deadline + watch.stall_s
    assert watch.worker < 700 * 2**20
    assert watch.growth < 300 * 2**20
    return Counter("stopped" if r.timed_out else "right" if r.parts["accuracy"] else "wrong" for r in results), pool


@pytest.mark.alone
def test_ten_thousand_of_them() -> None:
    texts = mathematical()
    programs = [f"```python\n{program}\n```" for program in PROGRAMS for _ in range(12)]
    assert len(texts) + len(programs) >= 10_000
    became, pool = check_all(MathVerifyReward(), texts, "34")
    assert became["stopped"] < 500  # how many depends on the machine
    assert pool.counts["crash"] == 0
    became_there, _ = check_all(MathVerifyReward(equality="library"), list(HANGS) * 2, "34")
    assert became_there["stopped"] == len(HANGS) * 2  # math-verify's own comparison hangs on those
    # Some fragments happen to say 34, and control characters around it are no reason to miss it.
    assert 0 < became["right"] < 2000

    limits = SandboxLimits(wall_s=0.5, cpu_s=1, memory_mib=128)
    became, pool = check_all(CodeReward(limits=limits), programs, {"inputs": ["1\n"], "outputs": ["2\n"]})
    assert became == {"wrong": len(programs)}  # the sandbox ends them, the pool need not


@pytest.mark.parametrize(
    "reward",
    [LastNumberReward(), DapoMathReward(), DapoMathReward(strict=False)],
    ids=["last number", "dapo", "dapo lenient"],
)
def test_rewards_that_stay_in_the_trainers_process_are_quick_whatever_is_said(reward: VerifiableReward) -> None:
    """They are not in the pool: nobody would stop them."""
    assert not reward.pooled
    for text in mathematical()[::3]:
        began = time.process_time()
        reward(Prompt("hostile", "", (1,), "34"), [Completion((1,), (0.0,), "stop", text, 8, 0)])
        assert time.process_time() - began < 0.5


def test_countdown_is_quick_whatever_is_said() -> None:
    reward = CountdownReward()
    assert not reward.pooled
    for text in countdown_attacks():
        began = time.process_time()
        (result,) = reward(
            Prompt("hostile", "", (1,), {"numbers": [3, 4], "target": 12}),
            [Completion((1,), (0.0,), "stop", f"<answer>{text}</answer>", 8, 0)],
        )
        assert result.parts["accuracy"] == 0.0
        assert time.process_time() - began < 0.5


def countdown_attacks() -> Iterator[str]:
    yield from ("9**9**9**9", "(" * 499, "-" * 499, "1/0", "0x0c", "1_2", "3*4 #", "__import__('os')", "9" * 499)
    yield from ("(" * n + "12" + ")" * n for n in (10, 100, 200, 240, 10_000))
    yield from ("*".join(["99"] * n) for n in (10, 150, 10_000))

"""Finds out why engine and trainer differ, by further questions and by resending the weights in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ibro_lightning.engines.weight_names import weight_group
from ibro_lightning.engines.weight_questions import SHARES, Answer, Answers, Question, Questions, windows_of

NOT_THE_WEIGHTS = "Cause: not the weights, which have arrived, but"


def beyond_windows(config: Any, limit: int, questions: Questions) -> tuple[Question, str] | None:
    """A question that exceeds all windows below ``limit`` in ``config``, and the cause if its answer is wrong."""
    windows = {name: size for name, size in windows_of(config).items() if size < limit}
    if not windows:
        return None
    widest = max(windows.values())
    length = min(widest + 2 * questions.new_tokens, limit - questions.new_tokens)
    prompt = questions.prompt(length, "beyond the window")
    return Question(prompt, questions.same().seeds), _window_cause(windows)


def _window_cause(windows: dict[str, int]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in windows.items())
    cause = f"how far back the engine looks: shorter prompts are right, and one beyond the config's {sizes} is not"
    remedy = "If this architecture has no such window, remove it from config.json; otherwise use another engine"
    return f"{NOT_THE_WEIGHTS} {cause}. {remedy}"


class Diagnosis:
    """Diagnoses a failed check. Collective, since the policy may be sharded over the ranks."""

    def __init__(self, questions: Questions, fits: Callable[[Sequence[Answer]], bool]) -> None:
        self.questions, self.fits, self.ranks = questions, fits, questions.ranks
        self._engine, self._provider = questions.engine, questions.provider
        config = self._provider.model_spec().config.get_text_config()
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._windows = windows_of(config)

    def cause(self, answers: Answers, unchanged: bool, moved: float) -> str:
        """The cause and its remedy, in a sentence.

        Args:
            unchanged: whether the engine's answers are unchanged although the trainer has moved.
            moved: |Δlogp| in nats above which the trainer has moved.
        """
        others = [*answers.new, *answers.ended]
        others_fit = all(answer.difference <= moved for answer in others) if unchanged else self.fits(others)
        cache = not self.fits([answers.same]) and others_fit
        wrong = not self.fits(answers.all)
        batching = window = None
        stale: list[str] = []
        if self.ranks.any(wrong and not unchanged):
            batching, window = self._batching_fault(), self._window_fault()
            if self.ranks.any(wrong and not cache and not unchanged and batching is None and window is None):
                stale = self._stale_groups()
        if cache and window is None:
            seen = "a prompt seen before is continued wrongly, and new ones are not"
            return f"Cause: the prefix cache was not reset, as {seen}"
        if unchanged:
            return "Cause: the sync did not reach the engine, which answers as it did before the last update"
        if fault := batching or window:
            return fault
        if stale:
            tied = self._tied and stale == ["head"]
            head = " (the output head is tied to the embedding, and the engine keeps a copy)" if tied else ""
            return f"Cause: stale weights in the engine, mended by sending again: {', '.join(stale)}{head}"
        kind = self._provider.model_spec().config.get_text_config().model_type
        return (
            "Sending all weights again did not help, so the engine computes something else: another precision "
            f"(raise data.weight_check.tolerance if it is harmless), another implementation of the model type {kind!r} "
            "(write another data.engine: HFEngine or VLLMEngine), or a config that does not belong to the weights"
        )

    def _batching_fault(self) -> str | None:
        """The cause, if each row is right by itself but wrong in a batch."""
        questions = self.questions
        new = questions.new("diagnosis")
        single = [Question(question.prompt, question.seeds[:1]) for question in new]
        alone = [answer for question in single for answer in questions.ask([question])]
        batched, samples = questions.ask(single), questions.ask(new)
        ended = questions.ask_all("diagnosis").ended
        if not self.fits(alone):
            return None
        for answers, what in (
            (batched, "prompts of different lengths in one batch: its padding is wrong"),
            (samples, "several samples of one prompt: what they share is copied wrongly"),
            (ended, "rows that go on when others of their batch have ended: they are mixed up"),
        ):
            if not self.fits(answers):
                return f"{NOT_THE_WEIGHTS} how the engine handles {what}"
        return None

    def _window_fault(self) -> str | None:
        """The cause, if short prompts are right and those that exceed a window of the config are wrong."""
        questions = self.questions
        lengths = (questions.prompt_tokens, max(1, questions.prompt_tokens // SHARES[-1]))
        seeds = questions.same().seeds
        asked = [Question(questions.prompt(length, "window", length), seeds) for length in lengths]
        long, short = (questions.ask([question])[0] for question in asked)
        limits = [length + questions.new_tokens for length in lengths]
        windows = {name: size for name, size in self._windows.items() if limits[1] <= size < limits[0]}
        return _window_cause(windows) if windows and self.fits([short]) and not self.fits([long]) else None

    def _stale_groups(self) -> list[str]:
        """Resend the weights by group and return the groups that changed the answers; empty if that does not help."""
        stale: list[str] = []
        before = self.questions.ask_all("stale")
        names = [name for name, _ in self._provider.named_full_weights()]
        groups = dict.fromkeys(map(weight_group, names))
        for group in sorted(groups, key=lambda group: group != "head"):  # the most likely group first
            weights = self._provider.named_full_weights()
            self._engine.load_weights((pair for pair in weights if weight_group(pair[0]) == group), partial=True)
            after = self.questions.ask_all("stale")
            if before.same.generation != after.same.generation:
                stale.append(group)
            if not self.ranks.any(not self.fits(after.all)):
                return stale
            before = after
        return []

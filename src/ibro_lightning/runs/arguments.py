"""The arguments of the commands that have no recipe, refused in one line that names the argument."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

from ibro_lightning.guards import printing

_REQUIRED = re.compile(r"arguments are required: ([^,]+)|argument ([^:]+): expected")
_CHOICE = re.compile(r"argument ([^:]+): invalid choice: (.+) \(choose from")
_KIND = re.compile(r"argument ([^:]+): invalid (\w+) value: (.+)")
_NO_VALUE = re.compile(r"argument ([^:]+): ignored explicit argument (.+)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")
_KINDS = {"int": "a whole number", "float": "a number"}


class OneLineArguments(ArgumentParser):
    """Ends with one line on stderr and exit code 2 where argparse prints the usage as well."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for flag in (one.partition("=")[0] for one in takewhile(lambda one: one != "--", given)):
            # Before argparse, which would ask for what is required first.
            if flag.startswith("--") and not any(one.startswith(flag) for one in known):
                near = difflib.get_close_matches(flag[2:], [one[2:] for one in known], n=1)
                hint = f"did you mean --{near[0]}?" if near else f"it has {', '.join(known)}"
                self._refuse(f"{flag}: {self._command} has no such flag: {hint}")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        if found := _REQUIRED.search(message):
            argument = self._argument(found[1] or found[2])
            self._refuse(f"{argument.dest}: missing - write {_choices(argument) or argument.help}")
        if found := _CHOICE.search(message):
            argument = self._argument(found[1])
            self._refuse(f"{argument.dest}: {found[2]} - write {_choices(argument)}")
        if found := _KIND.search(message):
            self._refuse(f"{self._argument(found[1]).dest}: {found[3]} - write {_KINDS.get(found[2], found[2])}")
        if found := _NO_VALUE.search(message):
            self._refuse(f"{self._argument(found[1]).dest}: {found[2]} - it takes no value: leave that out")
        if found := _UNRECOGNIZED.search(message):
            others = ", ".join(action.dest for action in self._actions if not action.option_strings)
            self._refuse(f"argument: {found[1]!r} - {self._command} takes {others or 'nothing without a flag'}")
        self._refuse(message)

    @property
    def _command(self) -> str:
        return self.prog.split()[-1]

    def _argument(self, name: str) -> Action:
        """The argument with the name that argparse's messages have."""
        return next(one for one in self._actions if name in (one.dest, one.metavar, "/".join(one.option_strings)))

    def _refuse(self, line: str) -> NoReturn:
        printing.tell(f"error: {line}")
        raise SystemExit(2)


def _choices(argument: Action) -> str:
    return f"one of {', '.join(argument.choices)}" if argument.choices else ""

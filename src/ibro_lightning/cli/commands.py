"""The commands, and what the command line answers before torch is imported: usage, version and wrong arguments."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ibro_lightning import __version__
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.arguments import OneLineArguments

COMMANDS = {
    "fit": "train a policy; --ckpt_path last resumes a run",
    "validate": "evaluate a policy, or a checkpoint (--ckpt_path), on data.eval_sets",
    "test": "the same, once, for the numbers to report",
    "predict": "generate and judge responses to the questions of data.eval_sets",
    "study": "run several arms with many seeds, as a study file plans it",
    "compare": "compare two evaluations of the same questions",
    "report": "report on a study, or on runs: tables, tests, curves",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "verify": "try the verifier: GOLD RESPONSE",
    "doctor": "what is installed, what this machine can run, and what is missing",
}
PROGRAM = "python -m ibro_lightning"
USAGE = f"""usage: {PROGRAM} COMMAND [--config RECIPE] [--SETTING VALUE ...]

{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

  COMMAND --help                  its settings
  fit --model.help DAPOModule     those of a class
  --version                       the version

A RECIPE is a path, or the name of one that ships with the package, such as
quickstart.yaml."""


def answer(arguments: Sequence[str]) -> str | None:
    """The text to print if the arguments ask only for the usage or the version; None otherwise. Raises
    :class:`ConfigError` for an unknown command."""
    first = next(iter(arguments), "--help")
    if first in ("-h", "--help"):
        return USAGE
    if first == "--version":
        return f"ibro-lightning {__version__}"
    if not first.startswith("-") and first not in COMMANDS:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(COMMANDS)}"
        raise ConfigError("command", first, f"there is no such command: {hint}")
    return None


def export_parser() -> OneLineArguments:
    """The arguments of ``export``."""
    parser = OneLineArguments(
        prog=f"{PROGRAM} export",
        description="Write the policy of a checkpoint as a Hugging Face folder, and its critic, if any, to critic/ "
        "beside it. One process, on the CPU, whatever the checkpoint was written by.",
    )
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint; or last or best, with --run")
    parser.add_argument("--output", required=True, help="the folder to write, e.g. exported/model")
    parser.add_argument("--run", help="the run's folder; found from the checkpoint's path if left out")
    parser.add_argument("--config", help="a recipe; the run's own config.yaml if left out")
    parser.add_argument("--overwrite", action="store_true", help="move what an earlier export wrote there aside")
    return parser

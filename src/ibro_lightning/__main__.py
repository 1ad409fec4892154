"""``python -m ibro_lightning fit --config quickstart.yaml``, and the command ``ibro-lightning``."""

import sys

from ibro_lightning.cli.commands import COMMANDS, answer
from ibro_lightning.guards import printing, signals
from ibro_lightning.guards.interruption import Interrupted


def main() -> None:
    """Entry point of the process. Guards are installed first, because the remaining imports take seconds."""
    printing.protect()
    signals.begin()
    code: object = 0
    try:
        _command()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except Interrupted as stop:  # raised after the command had ended
        signals.leave(signals.exit_code(stop.exit_code))
    except KeyboardInterrupt:
        signals.leave(signals.exit_code(signals.CTRL_C))
    signals.end(code if isinstance(code, int) else 1)
    raise SystemExit(code)


def _command() -> None:
    argv = sys.argv[1:]
    if argv in ([], ["-h"], ["--help"], ["--version"]):
        print(answer(argv))
        printing.check_delivered()
        return
    from ibro_lightning.cli import main as cli

    if argv[0] in COMMANDS or argv[0].startswith("-"):
        cli.command(argv)  # imports what it needs, before the signals are those of a command that runs
    cli.main()


if __name__ == "__main__":
    main()

"""``python -m ibro_lightning fit --config quickstart.yaml``, and the command ``ibro-lightning``."""

import sys

from ibro_lightning.cli.commands import answer
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
    if sys.argv[1:] in ([], ["-h"], ["--help"], ["--version"]):
        print(answer(sys.argv[1:]))
        printing.check_delivered()
        return
    try:
        from ibro_lightning.cli import main as cli
    except ModuleNotFoundError as error:
        printing.tell(f"error: the Python package {error.name} is missing: pip install . installs all that is needed")
        raise SystemExit(2) from error
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        printing.tell("error: the installed packages are incompatible: see the traceback above, and pip check")
        raise SystemExit(1) from error
    cli.main()


if __name__ == "__main__":
    main()

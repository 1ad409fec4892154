"""Imported last by the server that processes fork from: it has parsed a recipe, for which Python reads the sources of
many classes, and what it holds stays for good. Otherwise each process would look for garbage in it, and so copy every
page that it shares with the others."""

import gc
import io
import os
from contextlib import redirect_stdout, suppress

from ibro_lightning.cli.main import main

os.fsync = lambda descriptor: None  # as in conftest.py
with redirect_stdout(io.StringIO()), suppress(SystemExit):
    main(["fit", "--config", "quickstart.yaml", "--print_config"])
gc.collect()
gc.freeze()

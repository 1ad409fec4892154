"""Imported last by the server that processes fork from: what it has imported stays for good, so that no process walks
through it to find garbage, which would copy every page that it shares with the others."""

import gc

gc.collect()
gc.freeze()

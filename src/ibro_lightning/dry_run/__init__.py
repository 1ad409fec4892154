"""Estimates what a run needs, before it runs: memory per rank, arithmetic per iteration."""

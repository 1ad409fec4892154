"""Checkpoints on disk: which exist, which are valid, and what they contain.

There are two forms, both named ``iteration_000020.ckpt``: a *file* written by ``torch.save``, with whole weights; and a
*folder* of ``torch.distributed.checkpoint`` shards. Any strategy reads either, on any number of processes. Optimizer
states are keyed by the parameter's position in its own optimizer, which does not depend on the strategy.
"""

"""Both sides of ``against_trl.py``: each runs in a process of its own, told by a job and heard by its report."""

"""Guards that keep a long run from losing work: signals, failing ranks, full disks, exhausted memory."""

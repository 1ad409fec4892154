"""What keeps a long run from losing work: signals, ranks that fail, full disks, memory that runs out."""

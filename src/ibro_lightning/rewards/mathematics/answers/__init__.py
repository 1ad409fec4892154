"""Answers as a mathematician reads and compares them: notation, numbers, sets, relations, units."""

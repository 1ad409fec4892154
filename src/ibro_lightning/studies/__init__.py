"""Studies: a recipe in several arms with many seeds, planned before it is run, and reported with intervals."""

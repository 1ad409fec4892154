"""Evaluation metrics, records on disk, and the comparison of two evaluations."""

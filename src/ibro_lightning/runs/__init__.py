"""A run's folder: its contents, which files are the run's, who may write there, and how a run resumes."""

"""The command line: LightningCLI with recipes by name, run folders, and one-line errors."""

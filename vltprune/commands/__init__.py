"""What the command line can do: one module a command, each with `add` (its arguments) and `run`. cli.py dispatches."""

"""The command line: one file a command; parse, choose implementations, call the step, print."""

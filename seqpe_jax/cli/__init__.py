"""The commands: flags in, calls, output and exit codes."""

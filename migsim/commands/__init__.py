"""The subcommands of `migsim`: each module has `add_arguments(parser)` and `run_<command>(arguments) -> exit code`."""

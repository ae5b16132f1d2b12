"""The command line's verbs, one file each: its docstring is its help, `add_arguments` declares its arguments, `run` makes its one call and
prints. Nothing heavy is imported before `run`: the table in cli.py imports every file here, for `megacpt --help` too."""

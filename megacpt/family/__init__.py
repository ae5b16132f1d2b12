"""What a model is, without torch: the table of its parameters, and what its config.json means. A new family is one file here and its name
in `families.py`."""

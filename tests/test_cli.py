"""The table of verbs: what stands in it, what its import costs, and what every verb says of itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from megacpt import cli, verbs
from megacpt.verbs.common import OVERRIDES

HEAVY = {"torch", "numpy", "pyarrow", "pydantic", "tokenizers", "transformers", "rich"}
NAMES = [verb.__name__.rpartition(".")[2] for verb in cli.VERBS]


def loaded(code: str) -> set[str]:
    """Heavy packages that a new interpreter has loaded after some code."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return HEAVY & set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_command_line_loads_nothing_heavy():
    """So `megacpt --help`, and a wrong argument, are answered at once."""
    assert loaded("import megacpt.cli") == set()
    assert "pydantic" in loaded("import megacpt.config.load")  # the check sees what is loaded


def test_every_file_of_verbs_stands_in_the_table():
    files = {path.stem for path in Path(verbs.__file__).parent.glob("*.py")} - {"__init__", "common"}
    assert sorted(NAMES) == sorted(files)


@pytest.mark.parametrize("name", NAMES)
def test_a_verb_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run([name, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    verb = cli.VERBS[NAMES.index(name)]
    assert end.value.code == 0 and " ".join(verb.__doc__.split())[:40] in told
    assert (OVERRIDES in told) == (name in ("check", "index", "inspect", "train", "assess", "evaluate"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "recipe"),
        (["fly"], "invalid choice"),
        ([], "VERB"),
        (["export", "runs/a", "--output", "x", "--optimizer.lr=1"], "unknown arguments for export"),
    ],
)
def test_arguments_that_no_verb_takes_leave_with_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(arguments)
    assert end.value.code == 2 and told in capsys.readouterr().err

"""Imports point one way, inside functions too; nobody but the command line starts a run."""

import ast
import re
from pathlib import Path

import pytest

from megacpt.config import run_layout

ROOT = Path(__file__).parents[1]
ROOMS = [
    "megacpt_kernels",
    "errors",
    "log",
    "files",
    "heartbeat",
    "faults",
    "compat",
    "family",
    "config",
    "data",
    "parallel",
    "objective",
    "model",
    "optim",
    "checkpoint",
    "evaluate",
    "survive",
    "train",
    "plan",
    "doctor",
    "verbs",
    "cli",
    "__main__",
]
TORCH_FREE = [
    "errors",
    "log",
    "files",
    "config",
    "family",
    "data",
    "plan",
    "survive/lease.py",
    "survive/run_directory.py",
    "survive/watchdog.py",
    "survive/supervise.py",
    "verbs",
    "cli",
    "optim/schedule.py",
    "model/split.py",
    "parallel/pipeline/schedule.py",
    "parallel/pipeline/simulate.py",
    "checkpoint/manifest.py",
]


def files():
    return [*sorted((ROOT / "megacpt").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "megacpt_kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {node.module} if node.module != "megacpt" else {f"megacpt.{alias.name}" for alias in node.names}
    return found


def violations(room: str, imported: set[str]) -> list[str]:
    wrong = []
    for name in imported:
        top, _, rest = name.partition(".")
        if top not in ("megacpt", "megacpt_kernels"):
            continue
        target = "megacpt_kernels" if top == "megacpt_kernels" else rest.partition(".")[0]
        if target in ("", "__version__"):
            continue
        if ROOMS.index(target) > ROOMS.index(room) or (target == "train" and room not in ("train", "verbs", "cli")):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path != ROOT / "megacpt/__init__.py":
        assert violations(room_of(path), imports_of(path)) == []


def test_the_rule_sees_a_wrong_import():
    assert violations("data", {"megacpt.model.decoder"}) and violations("plan", {"megacpt.train.loop"})
    assert not violations("model", {"megacpt.data.loader", "torch"})


PRIVATE = {  # operations of torch that the kernels call, what DTensors hold, what a subclass must override by its name
    "megacpt/compat.py": None,
    "megacpt/parallel/sharded.py": {"_local_tensor", "_spec"},
    "kernels/megacpt_kernels/adamw.py": {"_foreach_div_", "_fused_adamw_"},
    "kernels/megacpt_kernels/grad_norm.py": {"_foreach_norm"},
    "kernels/megacpt_kernels/attention_backends.py": {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
        "_opoverload",
        "_schema",
    },
    "kernels/megacpt_kernels/compile_check.py": {"_active"},
    "kernels/megacpt_kernels/bench.py": {"_C", "_cuda_getDriverVersion", "_foreach_div_"},
}
"""What each file may name of torch and Triton that is private; None for all."""


def own_names() -> set[str]:
    """Every name that a file of ours gives to something."""
    found = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(text: str, own: set[str]) -> set[str]:
    """Private names of others that a file uses: as attributes, by getattr, or in an import."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "os._exit":
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found |= {part.value for part in node.args[1:2] if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*node.module.split("."), *(alias.name for alias in node.names)}
    return {name for name in found if is_private(name)} - own


def test_private_torch_has_one_room():
    own = own_names()
    for path in files():
        allowed = PRIVATE.get(str(path.relative_to(ROOT)), set())
        if allowed is not None:
            assert private_names(path.read_text(), own) <= allowed, path
    used = {place: private_names((ROOT / place).read_text(), own) for place in PRIVATE}
    assert used["megacpt/compat.py"] and all(used[place] == names for place, names in PRIVATE.items() if names)


def test_the_rule_sees_private_torch():
    text = """
from torch.distributed._composable import state
import torch._dynamo
group._get_backend(device)
getattr(options, "_timeout", None)
self._own, os._exit(1), x.__class__
"""
    assert private_names(text, {"_own"}) == {"_composable", "_dynamo", "_get_backend", "_timeout"}


def test_a_device_is_asked_in_one_place():
    asking = [path for path in files() if "cuda.get_device_" in path.read_text()]
    assert asking == [ROOT / "kernels/megacpt_kernels/device.py"]


def test_rooms_without_torch_name_no_torch():
    for place in TORCH_FREE:
        target = ROOT / "megacpt" / place
        paths = target.rglob("*.py") if target.is_dir() else [target if target.suffix else target.with_suffix(".py")]
        for path in paths:
            tops = {name.partition(".")[0] for name in imports_of(path)}
            assert not tops & {"torch", "transformers", "megacpt_kernels"}, path


NAMES = re.compile(
    r"\b(model\.(layers|norm|embed)|self_attn|mlp\.|[qkvo]_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|[qk]_norm|"
    r"lm_head|embed_tokens|\w*layernorm|inv_freq)"
)
"""Names of parameters, as Hugging Face has them."""


def parameter_names_in(text: str) -> list[str]:
    """Parameters that a source names: in strings that are no docstrings, as arguments and as attributes. `.layers` of a decoder, its
    modules in order, is no name."""
    found, tree = [], ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found += [match.group() for match in NAMES.finditer(node.value)]
        elif isinstance(node, ast.Attribute | ast.Name | ast.arg):
            name = {ast.Attribute: "attr", ast.Name: "id", ast.arg: "arg"}[type(node)]
            found += [match.group() for match in NAMES.finditer(getattr(node, name))]
    return found


def test_parameters_have_names_only_where_they_are_placed():
    """The families list them, the decoder places them; every other room reads a column of the table."""
    for path in files():
        if path.is_relative_to(ROOT / "megacpt/family") or path == ROOT / "megacpt/model/decoder.py":
            assert path.name not in ("llama.py", "decoder.py") or parameter_names_in(path.read_text()), (
                "the rule sees them"
            )
            continue
        assert parameter_names_in(path.read_text()) == [], path


@pytest.mark.parametrize(
    "text, names",
    [
        ("if 'k_proj' in name: pass", ["k_proj"]),
        ("x = f'{prefix}.embed_tokens.weight'", ["embed_tokens"]),
        ("model.lm_head.weight", ["lm_head"]),
        ("freeze('model.layers.0.mlp.up_proj')", ["model.layers", "mlp.", "up_proj"]),
        ("def norm(post_attention_layernorm): pass", ["post_attention_layernorm"]),
        ('"""Of model.layers.*, as k_proj."""\nmodel.layers', []),
    ],
)
def test_the_rule_sees_a_name(text, names):
    assert parameter_names_in(text) == names


def test_kernels_is_no_package_of_its_own():
    """A top-level package `kernels` would hide the PyPI project that transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_nothing_unsafe_and_nothing_of_one_machine():
    for path in [*files(), *(ROOT / "launch").rglob("*.*")]:
        text = path.read_text()
        for word in (
            "allow_pickle=True",
            "weights_only=False",
            "trust_remote_code=True",
            "bind_all",
            "0.0.0.0",
            "shell=True",
        ):
            assert word not in text, f"{path}: {word}"


def test_names_of_test_files_are_unique():
    """pytest collects files of one name in two folders as one module, and stops."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


RENAMES = {"replace", "rename", "renames", "move", "symlink", "link"}
"""Of os, shutil and Path: what gives a file its name."""


def renames_of(source: str) -> list[int]:
    """Lines that give a file or a folder another name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in RENAMES]
    of_module = [
        call for call in named if isinstance(call.func.value, ast.Name) and call.func.value.id in ("os", "shutil")
    ]
    of_path = [call for call in named if call.func.attr in ("rename", "renames")]
    return sorted({call.lineno for call in [*of_module, *of_path]})


def test_files_get_their_names_in_one_room():
    """Whole or not there, down to the disk: files.py knows how, and nothing else tries."""
    for path in files():
        if path != ROOT / "megacpt/files.py":
            assert renames_of(path.read_text()) == [], path
    assert len(renames_of((ROOT / "megacpt/files.py").read_text())) >= 4
    assert renames_of("os.replace(a, b)\npath.rename(b)\n'a'.replace('b', 'c')") == [1, 2]


def names_of_runs(source: str) -> list[str]:
    """Names of a run directory that stand in a source as literals: a whole name that could be nothing else, or a part of a path."""
    names = {*run_layout.FILES, *run_layout.FOLDERS, run_layout.DTYPES}
    words = {
        "average",
        "gates",
        "lease",
        "profile",
        "snapshots",
    }  # which are other things, too, where no path is joined
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in names - words:
            found.append(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = node.right.values if isinstance(node.right, ast.JoinedStr) else [node.right]
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            found += [name for name in names & words for text in texts if name in text.split("/")]
    return sorted(found)


def test_names_in_a_run_directory_stand_in_one_room():
    own = {"megacpt/config/run_layout.py": None, "megacpt/data/prepare.py": ["plan.json"]}  # of its parts, not of a run
    for path in (ROOT / "megacpt").rglob("*.py"):
        allowed = own.get(str(path.relative_to(ROOT)), [])
        assert allowed is None or names_of_runs(path.read_text()) == allowed, path
    assert names_of_runs("run / 'gates' / f'{x}.png'; open('run.json'); kind == 'gates'; run / f'average/{x}'") == [
        "average",
        "gates",
        "run.json",
    ]


READS_JSON = {
    "megacpt/files.py": "the one reader",
    "megacpt/data/text.py": "lines of a user's text, each counted as bad or good",
    "megacpt/data/tokenizer.py": "what the tokenizers' library has just read",
    "megacpt/data/pieces.py": "what the tokenizers' library writes itself",
    "megacpt/survive/watchdog.py": "an argument that its parent process gives",
}


def reads_json(source: str) -> bool:
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(f.value.id, f.attr) for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)]
    return bool({("json", "load"), ("json", "loads")} & set(names))


def test_json_files_are_read_in_one_room():
    """Whatever stands in one, files.py makes one error of it; a reader of its own forgets one of the kinds."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "megacpt").rglob("*.py") if reads_json(path.read_text())}
    assert found == READS_JSON.keys()

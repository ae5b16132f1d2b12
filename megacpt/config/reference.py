"""The recipe's JSON schema and reference page, made from the models: `python -m megacpt.config.reference` writes docs/.

A test compares the files with what this makes, so neither can go stale.
"""

import json
from pathlib import Path
from typing import Any

from megacpt.config.recipe import Recipe

_HEAD = """# Recipe reference

One TOML file describes a run. Made from the models by `python -m megacpt.config.reference`; a test keeps it true.
Editors complete and check recipes with `docs/recipe.schema.json`.

Token quantities are integers or strings: K M B T are powers of ten, Ki Mi Gi Ti powers of two. Every key can be set on the
command line: `--section.key=value`, a stage's with `--stages.NAME.key=value`. Unknown keys are errors.
"""
_TABLES = {  # heading by model
    "Run": "[run]",
    "Model": "[model]",
    "Rope": "rope (in [model] and stages)",
    "Parallel": "[parallel]",
    "Precision": "[precision]",
    "Optimizer": "[optimizer]",
    "LearningRate": "lr (in [optimizer] or every stage)",
    "Objective": "[objective], or objective (in a stage)",
    "Checkpoint": "[checkpoint]",
    "Domain": "[data] NAME",
    "DomainOrder": "order (in [data] NAME)",
    "Packing": "[packing]",
    "MixtureRules": "[mixture]",
    "OnlineMixture": "online (in [mixture])",
    "NeedleGate": "[gates] NAME, kind needle",
    "RecoveryGate": "[gates] NAME, kind recovery",
    "ForgettingGate": "[gates] NAME, kind forgetting",
    "Validation": "[[validation]]",
    "Stage": "[[stages]]",
    "StageParallel": "parallel (in a stage)",
    "OnFail": "on_fail (in a stage)",
    "Average": "average (in a stage)",
    "Kernels": "[kernels]",
    "Health": "[health]",
    "Log": "[log]",
    "Profile": "[profile]",
}


def schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def page() -> str:
    definitions = schema()["$defs"]
    parts = [_HEAD]
    for model, heading in _TABLES.items():
        parts.append(f"\n## {heading}\n\n| key | value | default | meaning |\n|---|---|---|---|\n")
        required = definitions[model].get("required", [])
        for key, field in definitions[model]["properties"].items():
            default = "required" if key in required else f"`{_default(field)}`"
            parts.append(f"| `{key}` | {_kind(field)} | {default} | {field.get('description', '')} |\n")
    return "".join(parts)


def _default(field: dict[str, Any]) -> str:
    if field.get("default") is None:
        words = [choice["const"] for choice in field.get("anyOf", []) if "const" in choice]
        return json.dumps(words[0]) if words else "none"
    return json.dumps(field["default"]).replace("|", "\\|")


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return _TABLES.get(field["$ref"].rsplit("/", 1)[-1], "table").split(" (")[0]
    if field.get("type") == ["integer", "string"]:
        return "tokens"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    return {"object": "table"}.get(field.get("type"), str(field.get("type", "table")))


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    (docs / "recipe.md").write_text(page(), encoding="utf-8")
    (docs / "recipe.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")

"""The recipe's JSON schema and reference page, made from the models: `python -m megacpt.config.reference` writes docs/.

A test compares the files with what this makes, so neither can go stale.
"""

import json
from pathlib import Path
from typing import Any

from megacpt.config.base import OnResume, Resume, Section
from megacpt.config.recipe import Recipe
from megacpt.config.resume import sections_in

_HEAD = """# Recipe reference

One TOML file describes a run. This page is made from the code by `python -m megacpt.config.reference`, and a test keeps it up to date.
Editors complete and check recipes with `docs/recipe.schema.json`.

Token quantities are integers or strings: K M B T are powers of ten, Ki Mi Gi Ti powers of two. Every key can be set on the
command line: `--section.key=value`, a stage's with `--stages.NAME.key=value`. Unknown keys are errors.
"""
_RESUME: dict[Resume, str] = {
    "free": "may change",
    "unfinished stages": "may change, in stages that have not ended",
    "later stages": "may change, in stages that have not begun",
    "frozen": "may not change",
}


def schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def page() -> str:
    definitions = schema()["$defs"]
    parts = [_HEAD]
    for section in sections():
        parts.append(f"\n## {section.heading}\n\n{_line(section.__doc__)}{_on_resume(section)}\n\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n")
        required = definitions[section.__name__].get("required", [])
        for key, field in definitions[section.__name__]["properties"].items():
            default = "required" if key in required else _default(field)
            parts.append(f"| `{key}` | {_kind(field)} | {default} | {_line(field['description'])} |\n")
    return "".join(parts)


def sections() -> list[type[Section]]:
    """Every section under the recipe, in the order of the recipe."""
    found: list[type[Section]] = []

    def visit(section: type[Section]) -> None:
        for field in section.model_fields.values():
            for inner in sections_in(field.annotation):
                if inner not in found:
                    found.append(inner)
                    visit(inner)

    visit(Recipe)
    return found


def _on_resume(section: type[Section]) -> str:
    """What a resume may change, where the section says it."""
    if section.resume is None:
        return ""
    keys: dict[Resume, list[str]] = {}
    for name, field in section.model_fields.items():
        own: Resume | None = next((item.rule for item in field.metadata if isinstance(item, OnResume)), None)
        keys.setdefault(own or section.resume, []).append(f"`{name}`")
    if len(keys) == 1:
        return f" A resume {_RESUME[section.resume]}{' any of it' if section.resume == 'frozen' else ' all of it'}."
    return " " + " ".join(f"A resume {_RESUME[rule]}: {', '.join(names)}." for rule, names in keys.items())


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default is None:
        optional = any(choice.get("type") == "null" for choice in field.get("anyOf", []))
        words = [choice["const"] for choice in field.get("anyOf", []) if "const" in choice]
        return f"`{json.dumps(words[0])}`" if words and not optional else "none"
    if isinstance(default, dict) and set(default.values()) <= {None}:
        default = {}  # a section of which nothing is set
    return f"`{_line(json.dumps(default))}`"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        heading = next((s.heading for s in sections() if s.__name__ == field["$ref"].rsplit("/", 1)[-1]), "table")
        return heading.split(" (")[0]
    if field.get("type") == ["integer", "string"]:
        return "tokens"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    return "table" if field.get("type") == "object" else str(field.get("type", "table"))


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    (docs / "recipe.md").write_text(page(), encoding="utf-8")
    (docs / "recipe.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")

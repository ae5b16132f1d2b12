"""The recipe: one TOML file, validated whole before anything starts. Imports no torch."""

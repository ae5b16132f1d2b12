"""A room for each section of the recipe: its models, and what can be wrong with them for a recipe and a number of processes."""

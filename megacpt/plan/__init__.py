"""What can be said of a recipe before any process starts."""

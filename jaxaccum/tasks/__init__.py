"""Tasks: a model bound to its terms, its metrics and its batch format."""

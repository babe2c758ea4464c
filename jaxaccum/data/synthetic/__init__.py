"""The embedded data sets: scenes, streets and shapes, drawn from an index."""

"""A run: its loop, its files, its signals and processes, and its weights for who uses them."""

"""Between a program and its machine: XLA's flags, known answers, memory, the user's cache."""

"""Weights from elsewhere: files of other programs, never executed, and what they become."""

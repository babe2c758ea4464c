"""The measures of scripts/benchmark.py, and the plain PyTorch and OpenCV code they compare with."""

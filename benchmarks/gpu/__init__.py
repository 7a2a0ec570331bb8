"""The CUDA backend on a GPU: is it right, repeatable, clean, and how fast; see check.sh."""

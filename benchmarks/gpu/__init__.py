"""The CUDA backend on a GPU: check.sh runs it all; tests/cuda/test_on_gpu.py says what is right."""

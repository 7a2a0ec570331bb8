"""Check of the CUDA backend on a GPU: check.sh runs it; tests/cuda/test_on_gpu.py has the tests."""

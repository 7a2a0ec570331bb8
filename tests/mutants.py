"""Lines of nbnorm, each with a fault and the tests that should notice it: see mutate.py."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    original: str  # stands once in the file
    mutated: str
    tests: str  # arguments of pytest, in tests/
    reason: str = ""  # why no test can notice


LAYOUT = "nbnorm/_layout.py"
FRAME = "nbnorm/_frame.py"

MUTANTS = [
    Mutant(LAYOUT, "(n > 0 and C * S >= SAMPLE)", "C * S >= SAMPLE", "test_layout.py"),
    Mutant(
        LAYOUT, "if any(stride % itemsize for stride in strides):", "if False:", "test_layout.py"
    ),
    Mutant(LAYOUT, "C * S >= SAMPLE", "True", "test_layout.py"),
    Mutant(LAYOUT, "(c > S and S >= PLANE)", "c > S", "test_layout.py"),
    Mutant(LAYOUT, "(c > S and S >= PLANE)", "S >= PLANE", "test_layout.py"),
    Mutant(LAYOUT, "(S == 1 or s == 1)", "s == 1", "test_layout.py"),
    Mutant(LAYOUT, "(S == 1 or s == 1)", "True", "test_layout.py"),
    Mutant(LAYOUT, "(C == 1 or c == S", "(c == S", "test_layout.py"),
    Mutant(LAYOUT, "(N == 1 or n == C * S", "(n == C * S", "test_layout.py"),
    Mutant(LAYOUT, "strides[outer] != strides[inner] * shape[inner]", "False", "test_layout.py"),
    Mutant(LAYOUT, "if long[begin:end] != channels:", "if False:", "test_layout.py"),
    Mutant(LAYOUT, "sum(i < channel_axes[0] for i in long)", "0", "test_layout.py"),
    Mutant(
        LAYOUT,
        "shape[i] > 1 and strides[i] != expected",
        "strides[i] != expected",
        "test_layout.py",
    ),
    Mutant(LAYOUT, "if shape[i] > 1 and strides[i] != expected:", "if False:", "test_layout.py"),
]

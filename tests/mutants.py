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
CHECKS = "nbnorm/_checks.py"
CHANNEL = "nbnorm/cpu/channel.py"
COLUMNS = "nbnorm/cpu/columns.py"
ROWS = "nbnorm/cpu/rows.py"

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
    Mutant(CHECKS, "i == j or n <= 1 for i, j, n", "True for i, j, n", "test_overlap.py"),
    Mutant(CHECKS, "return len(places) < prod(shape)", "return False", "test_overlap.py"),
    Mutant(CHECKS, "return True  # fewer places than elements", "pass", "test_overlap.py"),
    Mutant(CHECKS, "except np.exceptions.TooHardError:  # not settled within bounds: refuse rather than corrupt\n        return True", "except np.exceptions.TooHardError:\n        return False", "test_overlap.py"),
    Mutant("nbnorm/functional.py", '_checks.apart(var_, "running_var", frame.x, "x")', "pass", "test_overlap.py"),
    Mutant("nbnorm/functional.py", '_checks.apart(mean_, "running_mean", frame.x, "x")', "pass", "test_overlap.py"),
    Mutant(CHANNEL, "q[c] = l - lo * p_c", "q[c] = -lo * p_c", "test_digits.py::test_a_mean_of_dy_between_two_floats_is_taken_off_whole"),
    Mutant(COLUMNS, "                    shift[c] = K64 + mean", "                    pass", "test_digits.py"),
    Mutant(ROWS, "            shift = K + mean", "            pass", "test_digits.py"),
    Mutant(COLUMNS, "RUN_ROWS = 32", "RUN_ROWS = 128", "test_digits.py"),
]

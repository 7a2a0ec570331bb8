"""scikit-learn's StandardScaler and nbnorm's: times, and errors of partial_fit.

python benchmarks/scaler.py speed      # fit and transform a million rows of 100 features
python benchmarks/scaler.py accuracy   # partial_fit in chunks, against exact arithmetic
"""

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import sklearn
from sklearn import preprocessing

from benchmarks.markdown import markdown
from benchmarks.runs import command_of, conditions, describe
from benchmarks.timing import Times, alternate
from nbnorm.integrations.sklearn import StandardScaler

SCALERS: dict[str, Callable[[], Any]] = {
    "scikit-learn": preprocessing.StandardScaler,
    "nbnorm": StandardScaler,
}
CHUNK = 1000  # rows of a partial_fit


def exact(column: np.ndarray) -> tuple[Fraction, Fraction]:
    """Return mean and biased variance of float64 values."""
    values = [Fraction(value) for value in column.tolist()]
    unit = max(value.denominator for value in values)  # a power of two
    whole = [int(value * unit) for value in values]
    total, squares, n = sum(whole), sum(value * value for value in whole), len(whole)
    return Fraction(total, n * unit), Fraction(n * squares - total * total, (n * unit) ** 2)


def errors(scaler: Any, x: np.ndarray) -> tuple[float, float]:
    """Return the greatest relative errors of mean_ and scale_ of a fitted scaler."""
    of_mean, of_scale = [], []
    for column, mean, scale in zip(x.T, scaler.mean_, scaler.scale_, strict=True):
        exact_mean, exact_var = exact(column)
        of_mean.append(abs(float(Fraction(mean) / exact_mean - 1)))
        of_scale.append(abs(float(Fraction(scale) ** 2 / exact_var - 1)) / 2)
    return max(of_mean), max(of_scale)


def accuracy(rows: int, columns: int) -> list[list[str]]:
    """Return errors after fitting float64 data of standard deviation 1 in chunks."""
    lines = [["mean", *(f"{name}: mean, scale" for name in SCALERS)]]
    for offset in (1.0, 1e4, 1e8):
        x = np.random.default_rng(0).normal(offset, 1.0, (rows, columns))
        line = [f"{offset:g}"]
        for make in SCALERS.values():
            scaler = make()
            for begin in range(0, rows, CHUNK):
                scaler.partial_fit(x[begin : begin + CHUNK])
            line.append(", ".join(f"{error:.1e}" for error in errors(scaler, x)))
        lines.append(line)
    return lines


def times(x: np.ndarray, rounds: int) -> dict[str, dict[str, Times]]:
    """Return the times of each call and scaler."""
    fitted = {name: make().fit(x) for name, make in SCALERS.items()}
    calls = {
        "fit": lambda scaler: scaler.fit(x),
        "transform": lambda scaler: scaler.transform(x),
        "fit_transform": lambda scaler: scaler.fit_transform(x),
    }
    return {
        name: alternate({who: partial(call, scaler) for who, scaler in fitted.items()}, rounds)
        for name, call in calls.items()
    }


def speed(rows: int, columns: int, rounds: int) -> list[list[str]]:
    """Time data in C order, float32 and float64, and float32 in Fortran order, as from pandas."""
    lines = [["X", "", "scikit-learn, ms", "nbnorm, ms", "ratio"]]
    for dtype, order in (("float32", "C"), ("float64", "C"), ("float32", "F")):
        x = np.random.default_rng(0).standard_normal((rows, columns), np.float32) + np.float32(3)
        x = np.asarray(x, dtype, order=order)
        found = times(x, rounds)
        both = (
            Times(*(sum(found[call][who][i] for call in ("fit", "transform")) for i in (0, 1)))
            for who in SCALERS
        )
        found["fit + transform"] = dict(zip(SCALERS, both, strict=True))
        for call, of_call in found.items():
            theirs, ours = (1e3 * of_call[who].least for who in SCALERS)
            medians = f"{of_call['scikit-learn'].median / of_call['nbnorm'].median:.1f}"
            lines.append(
                [f"{dtype}, {order}", call, f"{theirs:.0f}", f"{ours:.0f}",
                 f"{theirs / ours:.1f} ({medians})"]
            )  # fmt: skip
    return lines


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "accuracy"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--columns", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if given.what == "speed":
        table = speed(given.rows or 1_000_000, given.columns or 100, given.rounds)
    else:
        table = accuracy(given.rows or 100_000, given.columns or 8)
    found = conditions("numpy", "numba")
    found["versions"]["scikit-learn"] = sklearn.__version__
    print(describe(found))
    print(f"\n    {command_of('scaler.py', sys.argv[1:])}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()

"""Compute mean and variance of a data set larger than the program's memory.

The program writes pictures (three colours, float32) into a temporary file and computes the
statistics of each colour through a memory map. After importing and compiling, it limits itself to
64 MiB of additional memory, in which NumPy can neither load the file nor compute the variance of a
map of it. The pixels are integers and are counted when they are written, so the exact statistics
are known. At the end a BatchNorm layer takes over the statistics, to normalise pictures.

Linux only: other systems cannot limit memory without counting mapped files (RLIMIT_DATA).

    python population_stats.py              # under 20 seconds, 1 GiB of disk
    python population_stats.py --gib 20
"""

import argparse
import re
import resource
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nbnorm import BatchNorm
from nbnorm.population import population_stats

SIDE = 256
COLOURS = ("red", "green", "blue")
ROOM = 64 << 20


def write(path, number):
    """Write pictures; return the counts of each value in each colour, shape (3, 256)."""
    shape = (number, len(COLOURS), SIDE, SIDE)
    pictures = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    rng = np.random.default_rng(0)
    counts = np.zeros((len(COLOURS), 256), np.int64)
    for picture in tqdm(pictures, desc="writing", unit=" pictures"):
        for colour, count in zip(picture, counts, strict=True):
            darkest = rng.integers(129, dtype=np.uint8)  # so that pictures differ in their means
            values = darkest + rng.integers(128, size=(SIDE, SIDE), dtype=np.uint8)
            count += np.bincount(values.ravel(), minlength=256)
            colour[...] = values
    pictures.flush()
    return counts


def exactly(count):
    """Return mean and variance as fractions, from the counts of each value."""
    n, total, squares = (sum(int(k) * v**p for v, k in enumerate(count)) for p in range(3))
    return Fraction(total, n), Fraction(squares, n) - Fraction(total, n) ** 2


def limit_memory():
    """Limit this process to ROOM more memory than it uses now, not counting mapped files."""
    status = Path("/proc/self/status").read_text()
    has = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (has + ROOM, has + ROOM))
    print(f"memory {has >> 20} MiB, limit {(has + ROOM) >> 20} MiB")


def attempt(name, function):
    """Call a function that should exceed the limit, and print whether it did."""
    try:
        function()
    except MemoryError:
        print(f"{name:<36}MemoryError")
    else:
        print(f"{name:<36}fits; try a larger --gib")


def main():
    """Write pictures, try NumPy, compute the statistics, compare them with the exact ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=1, help="of data, default %(default)s")
    arguments = parser.parse_args()
    number = int(arguments.gib * 2**30) // (len(COLOURS) * SIDE**2 * 4)
    if number < 1:
        parser.error("--gib is too small for a picture")
    population_stats(np.zeros((64, len(COLOURS), SIDE, SIDE), np.float32))  # compiles
    limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.npy"
        counts = write(path, number)
        size = path.stat().st_size
        print(f"{number} pictures, {size / 2**20:,.0f} MiB\n")
        pictures = np.load(path, mmap_mode="r")
        attempt("numpy.load(path)", lambda: np.load(path))
        attempt("pictures.var(axis=(0, 2, 3))", lambda: pictures.var(axis=(0, 2, 3)))
        begin = time.perf_counter()
        stats = population_stats(pictures, progress=True)
        seconds = time.perf_counter() - begin
    print(f"{'population_stats(pictures)':<36}{seconds:.2f} s, {size / seconds / 1e9:.1f} GB/s\n")

    print(
        f"{'':<8}{'mean':>12}{'exact':>12}{'error':>10}{'variance':>14}{'exact':>12}{'error':>10}"
    )
    for colour, mean, var, count in zip(COLOURS, stats.mean, stats.var(), counts, strict=True):
        print(f"{colour:<8}", end="")
        for width, found, exact in zip((12, 14), (mean, var), exactly(count), strict=True):
            error = abs(Fraction(float(found)) - exact) / exact
            print(f"{found:{width}.1f}{float(exact):12.1f}{float(error):10.1e}", end="")
        print()

    layer = BatchNorm(len(COLOURS), affine=False).eval()
    layer.set_statistics(stats)
    print(f"\nlayer.running_mean {layer.running_mean.round(1)}")
    print(f"layer.running_var  {layer.running_var.round(1)}")


if __name__ == "__main__":
    main()

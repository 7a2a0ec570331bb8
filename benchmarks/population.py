"""Statistics in pieces: order of merges, chunk size, compressed files, averages over batches.

python benchmarks/population.py merge     # many chunks in sequence and in pairs: errors, time
python benchmarks/population.py chunks    # three files of 2 GB each, in chunks of several sizes
python benchmarks/population.py files     # compressed files, read along and across their chunks
python benchmarks/population.py batches   # averages over batches, against all values together
"""

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.runs import conditions, describe
from benchmarks.tables import markdown
from nbnorm import Moments, batch_norm_stats
from nbnorm._pairwise import Pairwise
from nbnorm.population import CHUNK, population_stats

DIGITS = Path(__file__).resolve().parents[1] / "docs" / "examples" / "data" / "mnist5k.npz"
SHAPES = ((2720, 3, 256, 256), (40_000, 64, 14, 14), (4_000_000, 128))
Lines = list[list[str]]


def in_pairs(parts: list[Moments]) -> Moments:
    merged = Pairwise()
    for part in parts:
        merged.add(part)
    return merged.total()


def merge() -> Lines:
    """Merge chunks of 1 to 63 values: greatest errors of 16 channels against longdouble, time."""
    orders = {"in sequence": lambda parts: Moments.merge(*parts), "in pairs": in_pairs}
    lines = [["chunks", "mean / std", "order", "mean, std", "M2, relative", "us a merge"]]
    for number in (1000, 100_000):
        for offset in (0.0, 1e3, 1e6, 1e8):
            rng = np.random.default_rng(0)
            rows = rng.integers(1, 64, number)
            x = rng.standard_normal((rows.sum(), 16)) + offset
            parts = [batch_norm_stats(chunk) for chunk in np.split(x, np.cumsum(rows)[:-1])]
            wide = x.astype(np.longdouble)
            mean = wide.mean(axis=0)
            m2 = np.sum((wide - mean) ** 2, axis=0)
            for name, order in orders.items():
                begin = time.perf_counter()
                merged = order(parts)
                spent = (time.perf_counter() - begin) / number
                of_mean = np.abs(merged.mean - mean) / np.sqrt(m2 / len(x))
                of_m2 = np.abs(merged.m2 - m2) / m2
                errors = f"{of_mean.max():.1e}", f"{of_m2.max():.1e}"
                lines.append([f"{number}", f"{offset:g}", name, *errors, f"{spent * 1e6:.1f}"])
    return lines


def chunks() -> Lines:
    """Time statistics of a memory map: best of five, in GB/s."""
    sizes = [1 << power for power in (16, 18, 20, 21, 22, 23, 24, 26)]
    lines = [["values a chunk", *map(str, SHAPES)], *([f"{size}"] for size in sizes)]
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.npy"
            written = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            rng = np.random.default_rng(0)
            for samples in np.array_split(written, 64):
                samples[...] = rng.integers(256, size=samples.shape, dtype=np.uint8)
            del written, samples
            x = np.load(path, mmap_mode="r")
            spent: dict[int, list[float]] = {size: [] for size in sizes}
            for _ in range(6):  # the first compiles and fills the page cache
                for size in sizes:
                    begin = time.perf_counter()
                    population_stats(x, chunk=size)
                    spent[size].append(time.perf_counter() - begin)
            for line, size in zip(lines[1:], sizes, strict=True):
                line.append(f"{x.nbytes / min(spent[size][1:]) / 1e9:.1f}")
            del x
    return lines


class Across:
    """A dataset without the `chunks` of the one that it wraps."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.shape, self.dtype = dataset, dataset.shape, dataset.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]


def files() -> Lines:
    """Time statistics of 256 MiB of data in compressed files: best of three, in seconds."""
    import h5py
    import zarr

    shape, layouts = (1024, 4, 128, 128), ((8, 4, 128, 128), (100, 1, 128, 128))
    lines = [["file", "its chunks", "compressed, MiB", "along its chunks", "across"]]
    rng = np.random.default_rng(0)
    for kind, chunks in product(("Zarr", "HDF5"), layouts):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            if kind == "Zarr":
                x = zarr.create_array(path, shape=shape, chunks=chunks, dtype="float32")
            else:
                file = h5py.File(path, "w")
                x = file.create_dataset("x", shape, "float32", chunks=chunks, compression=1)
            for first in range(0, shape[0], 200):  # whole chunks, each compressed once
                samples = min(200, shape[0] - first)
                values = rng.integers(1 << 12, size=(samples, *shape[1:])) / 256
                x[first : first + samples] = values
            spent: dict[str, list[float]] = {"along": [], "across": []}
            for _ in range(4):  # the first compiles and fills the page cache
                for way, data, chunk in (("along", x, CHUNK), ("across", Across(x), CHUNK // 3)):
                    begin = time.perf_counter()
                    population_stats(data, chunk=chunk)
                    spent[way].append(time.perf_counter() - begin)
            if kind == "HDF5":
                file.close()
            stored = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            size = sum(file.stat().st_size for file in stored) / 2**20
            times = [f"{min(seconds[1:]):.2f}" for seconds in spent.values()]
            lines.append([kind, " x ".join(map(str, chunks)), f"{size:.0f}", *times])
    return lines


def batches() -> Lines:
    """Averaged and merged statistics of a layer of 100 units on 5000 digits: greatest errors."""
    with np.load(DIGITS) as digits:
        images, labels = digits["images"].reshape(-1, 784) / 255, digits["labels"]
    rng = np.random.default_rng(0)
    x = images @ rng.normal(0, 0.05, (784, 100))
    shuffled = x[rng.permutation(len(x))]
    cases = {
        "50 of 100, shuffled": np.split(shuffled, 50),
        "19 of 263 and one of 3, shuffled": np.split(shuffled, range(263, 4998, 263)),
        "10 of 500, a digit each": np.split(x[np.argsort(labels, kind="stable")], 10),
    }
    mean, var = x.mean(axis=0), x.var(axis=0, ddof=1)
    lines = [["batches", "averaged: mean, std", "variance", "merged: mean, std", "variance"]]
    for name, parts in cases.items():
        averages = [np.mean([part.mean(axis=0) for part in parts], axis=0)]
        averages.append(np.mean([part.var(axis=0, ddof=1) for part in parts], axis=0))
        stats = population_stats(parts)
        line = [name]
        for found_mean, found_var in (averages, (stats.mean, stats.var(correction=1))):
            line.append(f"{np.max(np.abs(found_mean - mean) / np.sqrt(var)):.1e}")
            line.append(f"{np.max(np.abs(found_var / var - 1)):.1e}")
        lines.append(line)
    return lines


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure = {"merge": merge, "chunks": chunks, "files": files, "batches": batches}
    parser.add_argument("what", choices=measure)
    what = parser.parse_args().what
    command = f"python benchmarks/population.py {what}"
    print(
        f"{describe(conditions('numpy', 'numba'))}\n\n    {command}\n\n{markdown(measure[what]())}"
    )


if __name__ == "__main__":
    main()

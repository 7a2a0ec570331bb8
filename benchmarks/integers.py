"""Time normalising images from bytes: `python benchmarks/integers.py`.

Each library runs in its own processes. Prints the minimum over all rounds, in milliseconds and as a
multiple of nbnorm's inference, for uint8 images in NHWC order: nbnorm's inference and statistics,
NumPy's expression, and four ways of PyTorch. y is float32.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import in_turns, least

SHAPES = [(32, 224, 224, 3), (8, 512, 512, 3), (32, 64, 64, 16)]


def numpy_calls(x, mean, std):
    return {"(x.astype(f4) - mean) / std": lambda: (x.astype(np.float32) - mean) / std}


def nbnorm_calls(x, mean, std):
    import nbnorm

    var = std.astype(np.float64) ** 2
    return {
        "nbnorm inference": lambda: nbnorm.batch_norm_inference(
            x, None, None, mean, var, eps=0.0, axis=-1
        ),
        "nbnorm stats": lambda: nbnorm.batch_norm_stats(x, axis=-1),
    }


def torch_calls(x, mean, std):
    import torch

    x, mean, std = map(torch.from_numpy, (x, mean, std))
    scale, shift = 1 / std, -mean / std
    compiled = torch.compile(lambda x: x.float() * scale + shift)
    functional, nchw, var = torch.nn.functional.batch_norm, x.permute(0, 3, 1, 2), std**2
    return {
        "torch x.float().sub_().div_()": lambda: x.float().sub_(mean).div_(std),
        "torch addcmul": lambda: torch.addcmul(shift, x.float(), scale),
        "torch F.batch_norm": lambda: functional(nchw.float(), mean, var, eps=0.0),
        "torch.compile": lambda: compiled(x),
    }


CALLS = {"numpy": numpy_calls, "nbnorm": nbnorm_calls, "torch": torch_calls}


def times(library):
    """Return the minimum time of each call, for each shape."""
    rng, found = np.random.default_rng(0), []
    for shape in SHAPES:
        x = rng.integers(0, 255, shape, np.uint8, endpoint=True)
        mean = rng.uniform(90, 130, shape[-1]).astype(np.float32)
        std = rng.uniform(40, 70, shape[-1]).astype(np.float32)
        best = {}
        for name, call in CALLS[library](x, mean, std).items():
            try:
                best[name] = least(call)
            except Exception as error:  # such as a missing compiler
                print(f"{name}: {type(error).__name__}", file=sys.stderr)
        found.append(best)
    return found


def main():
    """Print a table of all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library", choices=CALLS, help="print one round of one library as JSON")
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(times(arguments.library)))
        return
    found = in_turns(__file__, CALLS, arguments.rounds)
    for shape, best in zip(SHAPES, found, strict=True):
        print(" x ".join(map(str, shape)))
        for name, ms in best.items():
            print(f"  {name:30} {ms:8.2f}  {ms / best['nbnorm inference']:5.1f}")


if __name__ == "__main__":
    main()

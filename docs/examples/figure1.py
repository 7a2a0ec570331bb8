"""Repeat Figure 1 of the batch normalization paper, on real digits.

S. Ioffe & C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015), section 4.1: a network of three hidden layers of 100 sigmoids each and a
softmax over ten classes learns handwritten digits in batches of 60, without and with batch
normalization of every sigmoid's input. Panel (a) shows the accuracy on the test digits; (b) and (c)
show how the distribution of one sigmoid's input changes as the layers before it learn, at the first
of the learning rates. Look at how little the rate matters to the blue lines, and how much to the
orange ones.

NumPy computes the matrix products, nbnorm the normalisation, forward and backward. Both networks
start from the same weights and see the same batches. The paper trains on 60,000 binary images and
tests on 10,000; this program uses 4,000 and 1,000 in grey (data/README.md names the source), or
the images in a folder with the four files of MNIST or Fashion-MNIST.

Over five seeds and 50,000 steps (docs/results/figure1.json) the network with batch normalization
reaches a mean accuracy of 0.89 after 1,500 steps at a rate of 0.02, after 500 at 0.1 and after
1,000 at 0.5. The network without it needs 49,000, 10,500 and 3,500 steps (tests are 500 steps
apart). After 50,000 steps at 0.1 the accuracies are 0.917 and 0.905 (over seeds 0.912 to 0.927, and
0.899 to 0.911).

    python figure1.py                              # under a minute, writes figure1.png
    python figure1.py --quick                      # a few seconds
    python figure1.py --steps 50000 --seeds 5      # the paper's length, five times
    python figure1.py --rates 0.02 0.1 0.5         # three learning rates
    python figure1.py --data ~/fashion-mnist

With --results the program draws the figure from that file, after running what is missing from it.
"""

# sphinx_gallery_thumbnail_path = "results/figure1.svg"

import argparse
import gzip
import time
from itertools import cycle, pairwise
from pathlib import Path

from perceptron import Network, digits  # before NumPy, whose threads it sets

# isort: split
import numpy as np
import runs
from tqdm import tqdm

SIZES = (784, 100, 100, 100, 10)
BATCH = 60
PERCENTILES = (15, 50, 85)
NETWORKS = {"with BN": "before", "without BN": None}
COLORS = {"with BN": "tab:blue", "without BN": "tab:orange"}
DASHES = ("-", "--", ":", "-.")  # of the learning rates


def idx_digits(folder):
    """Return the digits like `perceptron.digits`, from IDX files in a folder, gzipped or not."""
    pairs = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte")
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
        if images.shape != (len(labels), 28, 28):
            raise ValueError(f"{part} has images of shape {images.shape} for {len(labels)} labels")
        pairs.append((images.reshape(-1, 784).astype(np.float32) / 255, labels))
    return pairs


def read_idx(folder, name):
    """Return the bytes of an IDX file as an array; its header has type, rank and lengths."""
    for path, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with opened(path, "rb") as file:
                content = file.read()
            rank = content[3]
            shape = np.frombuffer(content, ">i4", rank, offset=4)
            values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
            if content[:3] != b"\0\0\x08" or values.size != np.prod(shape, dtype=int):
                raise ValueError(f"{path} is not an IDX file of bytes")
            return values.reshape(shape)
    raise FileNotFoundError(f"{folder} has no {name}, nor {name}.gz")


def percentiles(network, images):
    """Return percentiles of the input of the last hidden layer's first sigmoid."""
    for layer in network.layers[:-3]:
        images = layer.forward(images)
    return np.percentile(images[:, 0], PERCENTILES)


def train(data, steps, seed, rate):
    """Train both networks on the same batches, and test them up to a hundred times.

    Returns a dict per network, with lists "accuracy" (k,) and "percentiles" (k, 3), and with
    "microseconds", the mean time of a step.
    """
    (images, labels), test = data
    networks = {
        name: Network(SIZES, np.random.default_rng(seed), batch_norm=batch_norm)
        for name, batch_norm in NETWORKS.items()
    }
    found = {name: {"accuracy": [], "percentiles": [], "microseconds": 0.0} for name in networks}
    tests = set(tested_at(steps))
    rng = np.random.default_rng(seed + 1)
    for step in tqdm(range(1, steps + 1), desc=key(rate, seed), unit=" steps"):
        batch = rng.integers(len(images), size=BATCH)
        for name, network in networks.items():
            begin = time.perf_counter()
            network.backpropagate(images[batch], labels[batch])
            network.descend(rate)
            found[name]["microseconds"] += 1e6 * (time.perf_counter() - begin) / steps
        if step in tests:
            for name, network in networks.items():
                # `percentiles` relies on `accuracy`, which switches the network to evaluation.
                found[name]["accuracy"].append(round(float(network.accuracy(*test)), 5))
                found[name]["percentiles"].append(percentiles(network, test[0]).round(4).tolist())
    for result in found.values():
        result["microseconds"] = round(result["microseconds"], 1)
    return found


def tested_at(steps):
    """Return up to a hundred steps to test after, including the last."""
    return np.unique(np.ceil(np.linspace(0, steps, 101)).astype(int))[1:].tolist()


def key(rate, seed):
    """Return the name of a run."""
    return f"rate {rate}, seed {seed}"


def accuracies(found, name):
    """Return the accuracies of a network, (seeds, tests)."""
    return np.array([run[name]["accuracy"] for run in found])


def print_table(steps, found):
    """Print the mean test accuracy over seeds in twenty rows, and times, for all rates."""
    columns = {(rate, name): of for rate, of in found.items() for name in NETWORKS}
    print("\ntest accuracy")
    print(f"{'rate':>8}", *(f"{rate:>12g}" for rate, _ in columns))
    print(f"{'step':>8}", *(f"{name:>12}" for _, name in columns))
    means = [accuracies(of, name).mean(axis=0) for (_, name), of in columns.items()]
    for row in np.unique(np.ceil(np.linspace(0, len(steps), 21)).astype(int))[1:] - 1:
        print(f"{steps[row]:>8}", *(f"{mean[row]:>12.3f}" for mean in means))
    print()
    for (rate, name), of in columns.items():
        last = accuracies(of, name)[:, -1]
        times = np.median([run[name]["microseconds"] for run in of])
        over = f", {last.min():.3f} to {last.max():.3f} over {len(last)} seeds"
        print(
            f"{name}, rate {rate:g}: {times:.0f} us a step; accuracy in the end {last.mean():.3f}"
            f"{over if len(last) > 1 else ''}"
        )


def draw(steps, found, tested, output):
    """Write the figure: (a) accuracy; (b, c) a sigmoid's input, at the first rate and seed."""
    first, *others = found
    with runs.drawn(output, (12, 4.4)) as figure:
        grid = figure.add_gridspec(1, 3, width_ratios=(1.5, 1, 1))
        figure.suptitle(f"Ioffe & Szegedy (2015), Figure 1: batch normalization on {tested}")

        left = figure.add_subplot(grid[0])
        for name in NETWORKS:
            for rate, dashes in zip(found, cycle(DASHES)):
                accuracy = accuracies(found[rate], name)
                label = f"{name}, rate {rate:g}" if others else name
                mean, color = accuracy.mean(axis=0), COLORS[name]
                left.plot(steps, mean, dashes, color=color, label=label)
                band = accuracy.min(axis=0), accuracy.max(axis=0)
                left.fill_between(steps, *band, color=color, alpha=0.25, linewidth=0)
        seeds = len(found[first])
        over = "" if seeds == 1 else f"; mean and range of {seeds} seeds"
        left.set(title=f"(a) test accuracy{over}", xlabel="step", ylabel="accuracy")
        left.set(ylim=(0, 1), xlim=(0, steps[-1]))
        left.grid(alpha=0.3)
        left.legend(loc="lower right", frameon=False)

        middle = figure.add_subplot(grid[1])
        right = figure.add_subplot(grid[2], sharey=middle)
        for panel, letter, name in ((middle, "b", "without BN"), (right, "c", "with BN")):
            lines = np.array(found[first][0][name]["percentiles"]).T
            for line, upper in pairwise(lines):
                panel.fill_between(steps, line, upper, color=COLORS[name], alpha=0.25, linewidth=0)
            panel.plot(steps, lines[1], color=COLORS[name])
            for percent, line in zip(PERCENTILES, lines, strict=True):
                panel.annotate(
                    f"{percent} %",
                    (steps[-1], line[-1]),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                )
            at = f", rate {first:g}" if others else ""
            panel.set(title=f"({letter}) a sigmoid's input {name}{at}", xlabel="step")
            panel.set(xlim=(0, steps[-1]))
            panel.grid(alpha=0.3)
        middle.set_ylabel("15th, 50th and 85th percentile")


def options():
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=10_000, help="default %(default)s")
    length.add_argument(
        "--quick", dest="steps", action="store_const", const=1000, help="1,000 steps"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.1], help="learning rates, default 0.1"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one, default %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="how many, default %(default)s")
    parser.add_argument("--data", type=Path, help="folder with the IDX files of (Fashion-)MNIST")
    parser.add_argument("--results", type=Path, help="JSON to keep finished seeds in")
    parser.add_argument(
        "--output", type=Path, default=Path("figure1.png"), help="default %(default)s"
    )
    arguments = parser.parse_args()
    for name in ("steps", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return parser, arguments


def main():
    """Train, print the table, write the figure."""
    parser, arguments = options()
    runs.one_thread()
    tested = arguments.data.resolve().name if arguments.data else "handwritten digits"
    settings = {"steps": arguments.steps, "data": tested}
    try:
        data = idx_digits(arguments.data) if arguments.data else digits()
        finished = runs.read(arguments.results, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    for rate in arguments.rates:
        for seed in seeds:
            if key(rate, seed) not in finished:
                finished[key(rate, seed)] = train(data, arguments.steps, seed, rate)
                if arguments.results:
                    runs.write(arguments.results, settings, finished)
    steps = tested_at(arguments.steps)
    found = {rate: [finished[key(rate, seed)] for seed in seeds] for rate in arguments.rates}
    print_table(steps, found)
    draw(steps, found, tested, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()

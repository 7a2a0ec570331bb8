"""Shuffling and dropout with batch normalization, as section 4.2.1 of the paper changes them.

S. Ioffe & C. Szegedy (2015) shuffle training examples within shards, which "prevents the same
examples from always appearing in a mini-batch together" and "led to about 1% improvements in the
validation accuracy"; and they remove dropout (40 % in Inception), as batch normalization "fulfills
some of the same goals". This program tries both on the networks Baseline and BN-x5 of figure2.py,
at the same small scale:

- with the same batches in every epoch, with examples shuffled within shards of 512 digits, and with
  examples shuffled across all shards;
- with dropout of 0.6, of 0.4, and without dropout.

With five seeds and 1,000 steps (docs/results/shuffling_dropout.json) the paper's 1% for shuffling
does not show: the means of BN-x5 differ by at most 0.4 points; the means of Baseline differ more,
but its seeds differ by even more. Dropout agrees with the paper: BN-x5 does not need it, as its
means differ by at most 0.2 points, while Baseline does best with 0.4. Look at how little the blue
dots move, and how much the black ones.

    python shuffling_dropout.py --quick                # a minute, writes shuffling_dropout.png
    python shuffling_dropout.py --seeds 5 --results shuffling_dropout.json
"""

# sphinx_gallery_thumbnail_path = "results/shuffling_dropout.svg"

import argparse
from pathlib import Path

import figure2
import numpy as np
import runs
from figure2 import CHANGED, VARIANTS, Habits

RATE = 0.05
LAST = 10  # tests whose mean is a run's accuracy
NETWORKS = {"Baseline": Habits(), "BN-x5": CHANGED}
DROPOUT = (0.6, 0.4, 0.0)
# The habits of all runs, by panel, network and change.
PANELS = {
    "shuffling": {
        (network, name): habits._replace(shuffling=kind)
        for network, habits in NETWORKS.items()
        for name, kind in (("none", "none"), ("within shards", "within"), ("across", "across"))
    },
    "dropout": {
        (network, f"{dropout:g}"): habits._replace(dropout=dropout)
        for network, habits in NETWORKS.items()
        for dropout in DROPOUT
    },
}


def key(network, habits, seed):
    """Return the name of a run; panels share runs with equal habits."""
    return f"{network}, shuffling {habits.shuffling}, dropout {habits.dropout:g}, seed {seed}"


def accuracies(panel, seeds, finished):
    """Return the accuracy of each seed for every network and change of a panel."""
    return {
        case: np.array([
            np.mean(finished[key(case[0], habits, seed)]["accuracy"][-LAST:]) for seed in seeds
        ])
        for case, habits in PANELS[panel].items()
    }  # fmt: skip


def print_table(found):
    """Print the mean and range over seeds of every accuracy."""
    for panel, of in found.items():
        print(f"\n{panel:<28}{'accuracy':>9}   over seeds")
        for (network, change), seen in of.items():
            ends = f"   {seen.min():.1%} to {seen.max():.1%}" if len(seen) > 1 else ""
            print(f"{network:<12}{change:<16}{seen.mean():>9.1%}{ends}")


def draw(found, output):
    """Write the figure: accuracies of all seeds, and their means as lines."""
    with runs.drawn(output, (10, 4)) as figure:
        figure.suptitle("Small scale: an Inception of 4 modules on 4,000 digits, not ImageNet")
        panels = figure.subplots(1, len(found))
        for panel, (title, of) in zip(panels, found.items(), strict=True):
            for network in dict.fromkeys(network for network, _ in of):
                color = VARIANTS[network].color
                cases = {change: seen for (name, change), seen in of.items() if name == network}
                places = range(len(cases))
                means = [seen.mean() for seen in cases.values()]
                panel.plot(places, means, color=color, label=network)
                for place, seen in zip(places, cases.values(), strict=True):
                    panel.plot([place] * len(seen), seen, "o", color=color, alpha=0.5)
                panel.set_xticks(places, cases)
            panel.set(title=title, ylabel=f"accuracy, mean of the last {LAST} tests")
            panel.grid(alpha=0.3)
        panels[-1].legend(frameon=False)


def options():
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=1000, help="default %(default)s")
    length.add_argument("--quick", dest="steps", action="store_const", const=100, help="100 steps")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, default %(default)s")
    parser.add_argument("--results", type=Path, help="JSON file of finished runs")
    parser.add_argument(
        "--output", type=Path, default=Path("shuffling_dropout.png"), help="default %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.steps < figure2.TESTS:
        parser.error(f"--steps must be at least {figure2.TESTS}")
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    return parser, arguments


def main():
    """Train what is missing, print the table, write the figure."""
    parser, arguments = options()
    runs.one_thread()
    seeds = range(arguments.seeds)
    settings = {"steps": arguments.steps, "rate": RATE}
    try:
        finished = runs.read(arguments.results, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wanted = {
        key(network, habits, seed): (VARIANTS[network], habits, seed)
        for seed in seeds
        for panel in PANELS.values()
        for (network, _), habits in panel.items()
    }
    figure2.finish(wanted, finished, settings, arguments.results)
    found = {panel: accuracies(panel, seeds, finished) for panel in PANELS}
    print_table(found)
    draw(found, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()

"""Repeat Figures 2 and 3 of the batch normalization paper, at small scale: digits, not ImageNet.

S. Ioffe & C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift" (2015), section 4.2, train Inception on ImageNet, without and with batch
normalization before every nonlinearity, at 1, 5 and 30 times its learning rate. This program trains
a network of the same kind, with parallel towers of 1x1, 3x3 and double 3x3 convolutions and
pooling, but with four modules and 41,000 weights, on 4,000 handwritten digits (data/README.md names
the source) in batches of 32. PyTorch computes the convolutions, nbnorm the normalisation.

==============  ===================================================================================
Baseline        no batch normalization, at a rate of 0.05
Baseline-x5     the same at five times that rate, at which the paper's Inception diverged
BN-Baseline     the baseline with batch normalization before every nonlinearity
BN-x5, BN-x30   the same at 5 and 30 times the rate, with the changes of section 4.2.1
BN-x5-Sigmoid   BN-x5 with sigmoids for ReLUs
Sigmoid         the baseline with sigmoids; the paper's remained at chance
==============  ===================================================================================

The changes (--changes selects some of them): no dropout before the classifier; five times less L2;
six times faster decay of the rate; no local response normalization; new shuffling in every epoch
(the baseline repeats the same batches); less distortion of brightness and contrast.

With three seeds and 1,000 steps (docs/results/figure2.json) the results partly agree with the
paper's. Batch normalization alone needs less than half of the baseline's steps to reach the
baseline's best accuracy, and goes on to a higher one. With five times the rate and the changes it
needs less than a third. Sigmoids learn only with batch normalization. Unlike in the paper, 30 times
the rate is too high, so BN-x5 is best; BN-x5-Sigmoid exceeds the baseline; and the baseline at five
times its rate does not diverge, but learns badly or not at all.

    python figure2.py                                   # writes figure2.png
    python figure2.py --quick                           # a minute or two, a tenth of the steps
    python figure2.py --seeds 3 --results figure2.json  # runs only what is missing
    python figure2.py --networks Baseline --rate 0.02   # one network at another rate
"""

# sphinx_gallery_thumbnail_path = "results/figure2.svg"

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from nbnorm.integrations.torch import BatchNorm2d

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
BATCH = 32
SHARD = 512
TESTS = 40


class Habits(NamedTuple):
    """How a network is trained, apart from its learning rate; the defaults are the baseline's."""

    dropout: float = 0.4  # probability that an input of the classifier is dropped
    l2: float = 1e-4
    decay: int = 1  # number of times that the rate is halved during training
    lrn: bool = True
    shuffling: str = "none"  # between epochs: "none", "within" shards of 512 digits, or "across"
    distortion: float = 0.4  # of brightness and contrast


CHANGED = Habits(0.0, 2e-5, 6, False, "across", 0.1)  # section 4.2.1
CHANGES = Habits._fields


class Variant(NamedTuple):
    """One line of the table above."""

    batch_norm: bool
    times: float = 1  # multiplies the base rate
    sigmoid: bool = False
    changed: bool = False  # makes the changes of section 4.2.1
    color: str = "black"


VARIANTS = {
    "Baseline": Variant(False, color="black"),
    "Baseline-x5": Variant(False, 5, color="tab:gray"),
    "BN-Baseline": Variant(True, color="tab:orange"),
    "BN-x5": Variant(True, 5, changed=True, color="tab:blue"),
    "BN-x30": Variant(True, 30, changed=True, color="tab:green"),
    "BN-x5-Sigmoid": Variant(True, 5, sigmoid=True, changed=True, color="tab:purple"),
    "Sigmoid": Variant(False, sigmoid=True, color="tab:red"),
}


def convolution(inside, outside, size, variant, *, stride=1, pool=()):
    """Return a convolution, batch normalization if `variant` has it, and the nonlinearity."""
    conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=not variant.batch_norm)
    nn.init.kaiming_normal_(conv.weight)
    norm = [BatchNorm2d(outside, relu=not variant.sigmoid)] if variant.batch_norm else []
    last = [nn.Sigmoid()] if variant.sigmoid else [nn.ReLU()] * (not norm)
    return nn.Sequential(conv, *pool, *norm, *last)


class Inception(nn.Module):
    """Parallel towers of 1x1, 3x3 and double 3x3 convolutions, and of pooling."""

    def __init__(self, inside, outside, variant):
        super().__init__()
        narrow = outside // 4
        # Pooling commutes with the 1x1 convolution, and takes less time on fewer channels.
        pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        pooled = convolution(inside, narrow, 1, variant, pool=[pool])
        towers = [[convolution(inside, narrow, 1, variant)] for _ in range(3)] + [[pooled]]
        towers[1] += [convolution(narrow, narrow, 3, variant)]
        towers[2] += [convolution(narrow, narrow, 3, variant) for _ in range(2)]
        self.towers = nn.ModuleList(nn.Sequential(*tower) for tower in towers)

    def forward(self, x):
        """Return the outputs of all towers, concatenated along the channels."""
        return torch.cat([tower(x) for tower in self.towers], dim=1)


def with_changes(names):
    """Return the baseline's habits with the changes of these names."""
    return Habits(**{name: getattr(CHANGED, name) for name in names})


def network(variant, habits):
    """Return the network, from 28x28 pixels to ten scores."""
    return nn.Sequential(
        convolution(1, 16, 3, variant, stride=2),
        nn.LocalResponseNorm(5) if habits.lrn else nn.Identity(),
        Inception(16, 32, variant),
        Inception(32, 48, variant),
        nn.MaxPool2d(2),
        Inception(48, 64, variant),
        Inception(64, 96, variant),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(habits.dropout),
        nn.Linear(96, 10),
    )


def digits():
    """Return images, (5000, 1, 28, 28) in [0, 1], and labels."""
    with np.load(DIGITS) as file:
        images = torch.from_numpy(file["images"].astype(np.float32) / 255)
        return images.unsqueeze(1), torch.from_numpy(file["labels"].astype(np.int64))


def batches(images, labels, habits, rng):
    """Yield distorted batches endlessly, shuffled anew in every epoch as `habits` say."""
    order = torch.randperm(len(images), generator=rng)
    while True:
        for batch in order.split(BATCH):
            amounts = 2 * torch.rand(2, len(batch), generator=rng) - 1
            contrast, brightness = habits.distortion * amounts
            distorted = images[batch] * (1 + contrast).view(-1, 1, 1, 1)
            yield distorted + brightness.view(-1, 1, 1, 1), labels[batch]
        if habits.shuffling == "within":
            shards = order.split(SHARD)
            order = torch.cat([s[torch.randperm(len(s), generator=rng)] for s in shards])
        elif habits.shuffling == "across":
            order = torch.randperm(len(images), generator=rng)


def train(variant, data, seed, rate, steps, habits, progress):
    """Train a network, and test it after every fortieth of the steps.

    Returns a dict with "accuracy", a list, and "diverged", the first step with a loss that is not
    finite, or None.
    """
    images, labels = data
    torch.manual_seed(seed)
    model = network(variant, habits)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=rate * variant.times,
        momentum=0.9,
        weight_decay=habits.l2,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 ** (habits.decay / steps))
    rng = torch.Generator().manual_seed(seed)
    accuracy, diverged = [], None
    for step, (x, expected) in enumerate(batches(images[TEST:], labels[TEST:], habits, rng), 1):
        loss = functional.cross_entropy(model(x), expected)
        if not loss.isfinite():
            diverged = step
            accuracy += [0.1] * (TESTS - len(accuracy))  # one in ten by chance
            progress.update(steps - step + 1)
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
        if step in tested_at(steps):
            model.eval()
            with torch.inference_mode():
                scores = torch.cat([model(part) for part in images[:TEST].split(100)])
            model.train()
            right = scores.argmax(dim=1) == labels[:TEST]
            accuracy.append(round(right.float().mean().item(), 4))
        if step == steps:
            break
    return {"accuracy": accuracy, "diverged": diverged}


def finish(wanted, finished, settings, path):
    """Train the networks of `wanted` that are missing from `finished`, and add them to it.

    `wanted` has (variant, habits, seed) by the name of a run. After each run all finished ones are
    written to the JSON file `path`, unless that is None.
    """
    missing = {name: run for name, run in wanted.items() if name not in finished}
    data, rate, steps = digits(), settings["rate"], settings["steps"]
    with tqdm(total=steps * len(missing), unit=" steps", disable=not missing) as progress:
        for name, (variant, habits, seed) in missing.items():
            progress.set_description(name)
            finished[name] = train(variant, data, seed, rate, steps, habits, progress)
            if path:
                runs.write(path, settings, finished)


def key(name, seed):
    """Return the name of a run."""
    return f"{name}, seed {seed}"


def tested_at(steps):
    """Return the forty steps after which a network is tested; the last step is one of them."""
    return (np.arange(1, TESTS + 1) * steps // TESTS).tolist()


def table(steps, found):
    """Return the lines of Figure 3: steps to the baseline's best accuracy, and best accuracy.

    Both are computed from the mean over seeds. With several seeds a last column has the range of
    the best accuracies of single seeds.
    """
    means = {name: np.mean([run["accuracy"] for run in of], axis=0) for name, of in found.items()}
    reference = "Baseline" if "Baseline" in means else next(iter(means))
    target = means[reference].max()
    several = max(map(len, found.values())) > 1
    lines = [f"{'network':<15}{f'steps to {target:.1%}':>17}{'best accuracy':>15}"]
    lines[0] += "   over seeds" if several else ""
    for name, mean in means.items():
        reached = np.flatnonzero(mean >= target)
        count = str(tested_at(steps)[reached[0]]) if reached.size else "-"
        best = [max(run["accuracy"]) for run in found[name]]
        gone = sum(run["diverged"] is not None for run in found[name])
        lines.append(
            f"{name:<15}{count:>17}{mean.max():>15.1%}"
            + (f"   {min(best):.1%} to {max(best):.1%}" if several else "")
            + (f", diverged: {gone} of {len(best)}" if gone else "")
        )
    return lines


def draw(steps, found, output):
    """Write the figure: test accuracy by step, mean and range over seeds, whole and enlarged."""
    with runs.drawn(output, (12, 4.8)) as figure:
        figure.suptitle("Small scale: an Inception of 4 modules on 4,000 digits, not ImageNet")
        whole, top = figure.subplots(1, 2)
        for name, of in found.items():
            accuracy = np.array([run["accuracy"] for run in of])
            color = VARIANTS[name].color
            for panel in (whole, top):
                panel.plot(tested_at(steps), accuracy.mean(axis=0), color=color, label=name)
                panel.fill_between(
                    tested_at(steps), accuracy.min(axis=0), accuracy.max(axis=0),
                    color=color, alpha=0.15, linewidth=0,
                )  # fmt: skip
        seeds = max(map(len, found.values()))
        over = "" if seeds == 1 else f", mean and range of {seeds} seeds"
        whole.set(title=f"accuracy on 1,000 test digits{over}", ylim=(0, 1), ylabel="accuracy")
        figure.legend(*whole.get_legend_handles_labels(), loc="outside right", frameon=False)
        top.set(title="the same, from 90 %", ylim=(0.9, 0.98))
        for panel in (whole, top):
            panel.set(xlabel="step", xlim=(0, steps))
            panel.grid(alpha=0.3)


def options():
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=1000, help="default %(default)s")
    length.add_argument("--quick", dest="steps", action="store_const", const=100, help="100 steps")
    parser.add_argument(
        "--rate", type=float, default=0.05, help="the baseline's, default %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, default %(default)s")
    parser.add_argument("--networks", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--changes", nargs="*", default=CHANGES, choices=CHANGES,
        help="the changes of BN-x5, BN-x30 and BN-x5-Sigmoid; default: all",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, help="JSON file of finished runs")
    parser.add_argument(
        "--output", type=Path, default=Path("figure2.png"), help="default %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.steps < TESTS:
        parser.error(f"--steps must be at least {TESTS}")
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    return parser, arguments


def main():
    """Train what is missing, print the table, write the figure."""
    parser, arguments = options()
    runs.one_thread()
    steps, rate, changes = arguments.steps, arguments.rate, arguments.changes
    settings = {"steps": steps, "rate": rate, "changes": list(changes)}
    try:
        finished = runs.read(arguments.results, settings)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    seeds = range(arguments.seeds)
    changed, baseline = with_changes(changes), Habits()
    wanted = {
        key(name, seed): (VARIANTS[name], changed if VARIANTS[name].changed else baseline, seed)
        for seed in seeds
        for name in arguments.networks
    }
    finish(wanted, finished, settings, arguments.results)
    found = {name: [finished[key(name, seed)] for seed in seeds] for name in arguments.networks}
    print("", *table(steps, found), sep="\n")
    draw(steps, found, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()

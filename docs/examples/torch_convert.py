"""Train a convolutional network in PyTorch, with its own batch normalization and with nbnorm's.

Both networks start from the same weights and see the same batches of real digits (data/README.md
names the source). They differ only by one call of `convert`. Their first losses agree up to
float32's rounding, and their final accuracies are similar.

    python torch_convert.py              # half a minute
    python torch_convert.py --epochs 3
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nbnorm.integrations.torch import convert

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
BATCH = 50


def network():
    """Return three convolutions, each with batch normalization and ReLU, and a linear layer."""
    layers = []
    for inside, outside in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 10))


def digits():
    """Return centred images and labels."""
    with np.load(DIGITS) as file:
        images = torch.from_numpy(file["images"].astype(np.float32) / 255 - 0.13)
        return images.unsqueeze(1), torch.from_numpy(file["labels"].astype(np.int64))


def train(model, images, labels, epochs):
    """Train by SGD; return the loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main():
    """Train both networks and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    images, labels = digits()
    torch.manual_seed(0)
    model = network()
    models = {
        "PyTorch": model,
        "nbnorm": convert(deepcopy(model), fuse_relu=True),  # before the first is trained
    }
    deepcopy(models["nbnorm"])(images[:BATCH]).sum().backward()  # the first call compiles
    print("batch norm    first loss   last loss    accuracy   seconds")
    first = []
    for name, candidate in models.items():
        begin = time.perf_counter()
        losses = train(candidate, images[TEST:], labels[TEST:], arguments.epochs)
        seconds = time.perf_counter() - begin
        candidate.eval()
        with torch.inference_mode():
            right = candidate(images[:TEST]).argmax(1) == labels[:TEST]
        print(
            f"{name:<12}{losses[0]:12.3f}{losses[-1]:12.3f}"
            f"{right.float().mean().item():12.1%}{seconds:10.1f}"
        )
        first.append(losses[0])
    print(f"the first losses differ by {abs(first[1] - first[0]):.1g}")


if __name__ == "__main__":
    main()

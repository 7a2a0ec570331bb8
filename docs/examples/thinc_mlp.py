"""Train a small deep network in thinc, with and without batch normalization, on real digits.

The six hidden layers are thinc's `Relu`, or `Linear` and nbnorm's `BatchNorm`, which includes the
ReLU. Both networks see the same batches of digits (data/README.md names the source) and are tested
after each epoch. The second network is then saved and loaded, and must give the same answers.

    python thinc_mlp.py                  # a few seconds
    python thinc_mlp.py --epochs 20
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from thinc.api import SGD, CategoricalCrossentropy, Linear, Relu, Softmax, chain, fix_random_seed

from nbnorm.integrations.thinc import BatchNorm

DIGITS = Path(__file__).parent / "data" / "mnist5k.npz"
TEST = 1000
BATCH = 50
WIDTH = 100
DEPTH = 6


def network(*, batch_norm):
    """Return hidden layers and a softmax over ten classes."""
    layers = []
    for _ in range(DEPTH):
        if batch_norm:
            layers += [Linear(WIDTH), BatchNorm(activation="relu")]
        else:
            layers += [Relu(WIDTH)]
    return chain(*layers, Softmax(10))


def digits():
    """Return images, as rows of 784 values in [0, 1], and labels."""
    with np.load(DIGITS) as file:
        images = file["images"].reshape(-1, 784).astype(np.float32) / 255
        return images, file["labels"].astype(np.int64)


def train(model, images, labels, epochs, rate):
    """Train by gradient descent on cross-entropy; yield the test accuracy after each epoch."""
    targets = np.eye(10, dtype=np.float32)[labels]
    model.initialize(images[:BATCH], targets[:BATCH])
    optimizer, loss = SGD(rate), CategoricalCrossentropy()
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in TEST + rng.permutation(len(images) - TEST).reshape(-1, BATCH):
            guesses, backprop = model.begin_update(images[batch])
            backprop(loss.get_grad(guesses, targets[batch]))
            model.finish_update(optimizer)
        yield np.mean(model.predict(images[:TEST]).argmax(axis=1) == labels[:TEST])


def main():
    """Train both networks, print their accuracies, save and load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="default %(default)s")
    parser.add_argument("--rate", type=float, default=0.1, help="step size, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, default %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    images, labels = digits()
    # The first calls compile kernels, so train a network and discard it.
    list(train(network(batch_norm=True), images[: TEST + BATCH], labels[: TEST + BATCH], 1, 0.0))
    print("test accuracy by epoch, and seconds")
    for name, batch_norm in (("without", False), ("with BN", True)):
        fix_random_seed(arguments.seed)
        model = network(batch_norm=batch_norm)
        begin = time.perf_counter()
        accuracies = list(train(model, images, labels, arguments.epochs, arguments.rate))
        seconds = time.perf_counter() - begin
        print(f"{name:<9}", *(f"{accuracy:7.1%}" for accuracy in accuracies), f"{seconds:9.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model.to_disk(path)
        loaded = network(batch_norm=True).from_disk(path)
    same = np.array_equal(loaded.predict(images), model.predict(images))
    print(f"saved and loaded: {'the same answers' if same else 'other answers'}")


if __name__ == "__main__":
    main()

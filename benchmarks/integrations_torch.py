"""Compare nbnorm.integrations.torch with PyTorch's own batch norm, in ResNet-50 and alone.

    python benchmarks/integrations_torch.py
    python benchmarks/integrations_torch.py --resnet --batch 8 --side 64
    python benchmarks/integrations_torch.py --shapes 32x256x56x56

All calls are interleaved in one process, with the same number of threads. If Numba's threading
layer is omp, nbnorm's kernels run on PyTorch's threads. Otherwise each library has its own pool,
and PyTorch's idle threads spin for a while after each operator, on cores that Numba's threads need;
OMP_WAIT_POLICY=passive makes them sleep instead. The last line of the output shows that variable.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numba
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shapes import name_of, shape_of
from benchmarks.tables import multiple, number
from benchmarks.timing import alternate
from nbnorm.integrations.torch import batch_norm, convert

SHAPES = ((32, 256, 56, 56), (32, 64, 112, 112), (32, 512, 7, 7), (4096, 512))
BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 (with the stride) and 1 x 1, plus a shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)),
            *(nn.ReLU(True), nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.body(x).add_(self.shortcut(x)))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """Return ResNet-50 (He et al. 2015) in plain PyTorch, strides in the 3 x 3 convolutions."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inside = 64
    for i, blocks in enumerate(BLOCKS):
        width = 64 << i
        for j in range(blocks):
            layers.append(Bottleneck(inside, width, 2 if i and not j else 1))
            inside = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes)]
    return nn.Sequential(*layers)


def steps(batch: int, side: int, memory_format: torch.memory_format) -> dict[str, Callable]:
    """Return a training step of each model: forward, backward, SGD."""
    torch.manual_seed(0)
    model = resnet50().to(memory_format=memory_format)
    models = {
        "PyTorch": model,
        "converted": convert(deepcopy(model)),
        "converted, fuse_relu": convert(deepcopy(model), fuse_relu=True),
    }
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, (batch,))

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

        return step

    return {name: step_of(model) for name, model in models.items()}


def in_turns(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call; calls are long, so one call is a turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if i:  # the first compiles
                times[name].append(time.perf_counter() - begin)
    return times


def resnet(batch: int, side: int, rounds: int) -> None:
    formats = {"": torch.contiguous_format, " channels-last": torch.channels_last}
    for label, memory_format in formats.items():
        print(f"\nResNet-50{label}, {batch}x3x{side}x{side}, a training step, ms:")
        times = in_turns(steps(batch, side, memory_format), rounds)
        base = times["PyTorch"]
        for name, own in times.items():
            print(
                f"  {name:<21} least {number(min(own) * 1e3):>6}   median"
                f" {number(statistics.median(own) * 1e3):>6}   {multiple(min(base) / min(own))}x"
                f" ({multiple(statistics.median(base) / statistics.median(own))}x)"
            )


def function(shapes: list[tuple[int, ...]], rounds: int) -> None:
    """Time forward and backward through autograd, PyTorch's function and nbnorm's."""
    print("\nbatch_norm, forward + backward through autograd, ms (least):")
    for shape in shapes:
        for last in (False, True) if len(shape) == 4 else (False,):
            x = torch.randn(shape)
            if last:
                x = x.contiguous(memory_format=torch.channels_last)
            dy = torch.randn_like(x)
            x.requires_grad_()
            parameters = [torch.rand(shape[1], requires_grad=True) for _ in range(2)]
            running = torch.zeros(shape[1]), torch.ones(shape[1])
            inputs = [x, *parameters]

            def step(of: Callable, relu: bool = False) -> list[Tensor]:
                options = {"relu": True} if relu and of is batch_norm else {}
                y = of(x, *running, *parameters, training=True, **options)  # noqa: B023
                if relu and of is not batch_norm:
                    y = torch.relu_(y)
                return torch.autograd.grad(y, inputs, dy)  # noqa: B023

            times = alternate(
                {
                    "PyTorch": lambda: step(functional.batch_norm),
                    "nbnorm": lambda: step(batch_norm),
                    "PyTorch, ReLU": lambda: step(functional.batch_norm, True),
                    "nbnorm, ReLU": lambda: step(batch_norm, True),
                },
                rounds,
            )
            least = {name: time.least * 1e3 for name, time in times.items()}
            print(
                f"  {name_of(shape) + ' channels-last' * last:<28}"
                f" PyTorch {number(least['PyTorch']):>6}  nbnorm {number(least['nbnorm']):>6}"
                f"  {multiple(least['PyTorch'] / least['nbnorm']):>5}x   with ReLU"
                f" {number(least['PyTorch, ReLU']):>6} {number(least['nbnorm, ReLU']):>6}"
                f"  {multiple(least['PyTorch, ReLU'] / least['nbnorm, ReLU']):>5}x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--resnet", action="store_true", help="only ResNet-50")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="only the function, at these")
    parser.add_argument("--batch", type=int, default=16, help="default %(default)s")
    parser.add_argument("--side", type=int, default=96, help="side of images, default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    if options.resnet or not options.shapes:
        resnet(options.batch, options.side, options.rounds)
    if not options.resnet:
        function(options.shapes or list(SHAPES), options.rounds)
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    print(
        f"\nPyTorch {torch.__version__}, threads of both: {options.threads}, Numba's layer"
        f" {numba.threading_layer()}, OMP_WAIT_POLICY {policy}"
    )


if __name__ == "__main__":
    main()

"""Batch norm as each framework documents it, transcribed to plain NumPy, with its source.

The functions have the signatures of `convention_hosts` and do not use nbnorm.
"""

import numpy as np


def spread(array, x, axis):
    """Return one value per channel, shaped to broadcast against x."""
    shape = [1] * x.ndim
    for i in np.atleast_1d(axis):
        shape[i] = x.shape[i]
    return np.reshape(array, shape)


def over(x, axis):
    """Return the axes to reduce."""
    return tuple(i for i in range(x.ndim) if i not in np.atleast_1d(axis) % x.ndim)


def torch(options, arrays, batches, x):
    """torch.nn.BatchNorm2d: "x_new = (1 - momentum) x + momentum x_t"; the unbiased variance.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    eps, momentum = options.get("eps", 1e-5), options.get("momentum", 0.1)
    arrays = dict(arrays)
    x_mean, x_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    if options.get("track_running_stats", True):
        for batch in batches:
            arrays["num_batches_tracked"] = arrays["num_batches_tracked"] + 1
            of_new = 1 / int(arrays["num_batches_tracked"]) if momentum is None else momentum
            mean, var = batch.mean((0, 2, 3)), batch.var((0, 2, 3), ddof=1)
            arrays["running_mean"] = (1 - of_new) * arrays["running_mean"] + of_new * mean
            arrays["running_var"] = (1 - of_new) * arrays["running_var"] + of_new * var
        x_mean, x_var = arrays["running_mean"], arrays["running_var"]
    y = (x - spread(x_mean, x, 1)) / np.sqrt(spread(x_var, x, 1) + eps)
    if "weight" in arrays:
        y = y * spread(arrays["weight"], x, 1)
    if "bias" in arrays:
        y = y + spread(arrays["bias"], x, 1)
    return arrays, y


def keras(options, arrays, batches, x):
    """keras.layers.BatchNormalization: "moving_mean = moving_mean * momentum + mean(batch) * ...".

    https://keras.io/api/layers/normalization_layers/batch_normalization; `axis` holds the channels.
    """
    epsilon, momentum = options.get("epsilon", 1e-3), options.get("momentum", 0.99)
    axis = options.get("axis", -1)
    arrays = dict(arrays)
    for batch in batches:
        mean, var = batch.mean(over(x, axis)), batch.var(over(x, axis))
        arrays["moving_mean"] = arrays["moving_mean"] * momentum + mean * (1 - momentum)
        arrays["moving_variance"] = arrays["moving_variance"] * momentum + var * (1 - momentum)
    y = x - spread(arrays["moving_mean"], x, axis)
    y = y / np.sqrt(spread(arrays["moving_variance"], x, axis) + epsilon)
    if options.get("scale", True):
        y = y * spread(arrays["gamma"], x, axis)
    if options.get("center", True):
        y = y + spread(arrays["beta"], x, axis)
    return arrays, y


def flax(options, arrays, batches, x):
    """flax.linen.BatchNorm: "momentum: decay rate for the exponential moving average".

    https://flax-linen.readthedocs.io, API reference, normalization. The variance is E[x²] - E[x]².
    """
    epsilon, momentum = options.get("epsilon", 1e-5), options.get("momentum", 0.99)
    axis = options.get("axis", -1)
    arrays = dict(arrays)
    for batch in batches:
        mean, square = batch.mean(over(x, axis)), np.square(batch).mean(over(x, axis))
        arrays["mean"] = momentum * arrays["mean"] + (1 - momentum) * mean
        arrays["var"] = momentum * arrays["var"] + (1 - momentum) * (square - mean**2)
    y = x - spread(arrays["mean"], x, axis)
    y = y / np.sqrt(spread(arrays["var"], x, axis) + epsilon)
    if options.get("use_scale", True):
        y = y * spread(arrays["scale"], x, axis)
    if options.get("use_bias", True):
        y = y + spread(arrays["bias"], x, axis)
    return arrays, y


def onnx(options, arrays, batches, x):
    """BatchNormalization-15: "running_var = input_var * momentum + current_var * (1 - momentum)".

    https://onnx.ai/onnx/operators/onnx__BatchNormalization.html; "ReduceVar computes the
    population variance".
    """
    epsilon, momentum = options.get("epsilon", 1e-5), options.get("momentum", 0.9)
    arrays = dict(arrays)
    for batch in batches:
        mean, var = batch.mean((0, 2, 3)), batch.var((0, 2, 3))
        arrays["input_mean"] = arrays["input_mean"] * momentum + mean * (1 - momentum)
        arrays["input_var"] = arrays["input_var"] * momentum + var * (1 - momentum)
    y = (x - spread(arrays["input_mean"], x, 1)) / np.sqrt(
        spread(arrays["input_var"], x, 1) + epsilon
    )
    return arrays, y * spread(arrays["scale"], x, 1) + spread(arrays["B"], x, 1)


def caffe(options, arrays, batches, x):
    """BatchNormLayer::Forward_cpu, then ScaleLayer: blobs 0 and 1 are sums, blob 2 their weight.

    https://github.com/BVLC/caffe, src/caffe/layers/batch_norm_layer.cpp and scale_layer.cpp.
    """
    eps = options.get("eps", 1e-5)
    fraction = options.get("moving_average_fraction", 0.999)
    arrays = dict(arrays)
    for batch in batches:
        m = batch.size // batch.shape[1]
        unbias = m / (m - 1) if m > 1 else 1
        arrays["factor"] = arrays["factor"] * fraction + 1
        arrays["mean"] = batch.mean((0, 2, 3)) + fraction * arrays["mean"]
        arrays["variance"] = unbias * batch.var((0, 2, 3)) + fraction * arrays["variance"]
    scale_factor = 0 if arrays["factor"][0] == 0 else 1 / arrays["factor"][0]
    y = x - spread(arrays["mean"] * scale_factor, x, 1)
    y = y / np.sqrt(spread(arrays["variance"] * scale_factor, x, 1) + eps)
    if options.get("scale", True):
        y = y * spread(arrays["scale"], x, 1)
        if options.get("bias_term", True):
            y = y + spread(arrays["bias"], x, 1)
    return arrays, y


def chainer(options, arrays, batches, x):
    """chainer.functions.batch_normalization: "decay: decay rate of moving average".

    https://github.com/chainer/chainer, chainer/functions/normalization/batch_normalization.py;
    channel axes start at axis 1, and the variance is adjusted by m / max(m - 1, 1).
    """
    eps, decay = options.get("eps", 2e-5), options.get("decay", 0.9)
    axis = tuple(range(1, 1 + arrays["avg_mean"].ndim))
    arrays = dict(arrays)
    for batch in batches:
        m = batch.size // arrays["avg_mean"].size
        mean, var = batch.mean(over(x, axis)), batch.var(over(x, axis)) * m / max(m - 1, 1)
        arrays["avg_mean"] = arrays["avg_mean"] * decay + (1 - decay) * mean
        arrays["avg_var"] = arrays["avg_var"] * decay + (1 - decay) * var
    y = x - spread(arrays["avg_mean"], x, axis)
    y = y / np.sqrt(spread(arrays["avg_var"], x, axis) + eps)
    if options.get("use_gamma", True):
        y = y * spread(arrays["gamma"], x, axis)
    if options.get("use_beta", True):
        y = y + spread(arrays["beta"], x, axis)
    return arrays, y


def mxnet(options, arrays, batches, x):
    """mx.sym.BatchNorm: "moving_var = moving_var * momentum + data_var * (1 - momentum)".

    https://mxnet.apache.org/versions/1.9.1/api/python/docs/api/symbol; "if fix_gamma is true, then
    set gamma to 1".
    """
    eps, momentum = options.get("eps", 1e-3), options.get("momentum", 0.9)
    fixed, axis = options.get("fix_gamma", True), options.get("axis", 1)
    arrays = {name.removeprefix("arg:").removeprefix("aux:"): a for name, a in arrays.items()}
    for batch in batches:
        mean, var = batch.mean(over(x, axis)), batch.var(over(x, axis))
        arrays["bn_moving_mean"] = arrays["bn_moving_mean"] * momentum + mean * (1 - momentum)
        arrays["bn_moving_var"] = arrays["bn_moving_var"] * momentum + var * (1 - momentum)
    y = x - spread(arrays["bn_moving_mean"], x, axis)
    y = y / np.sqrt(spread(arrays["bn_moving_var"], x, axis) + eps)
    y = y * (1 if fixed else spread(arrays["bn_gamma"], x, axis))
    return arrays, y + spread(arrays["bn_beta"], x, axis)


def gluon(options, arrays, batches, x):
    """mx.gluon.nn.BatchNorm: the operator with fix_gamma = not scale; names and epsilon differ.

    https://mxnet.apache.org/versions/1.9.1/api/python/docs/api/gluon/nn
    """
    named = {f"bn_{name.replace('running', 'moving')}": a for name, a in arrays.items()}
    moved, y = mxnet(
        {
            "eps": options.get("epsilon", 1e-5),
            "momentum": options.get("momentum", 0.9),
            "fix_gamma": not options.get("scale", True),
            "axis": options.get("axis", 1),
        },
        named,
        batches,
        x,
    )
    return {name[3:].replace("moving", "running"): a for name, a in moved.items()}, y

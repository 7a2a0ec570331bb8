"""Batch norm run by the frameworks themselves: train from given arrays, return new ones and y.

Every function takes hyperparameters and arrays in the framework's form, training batches and an
input to normalise afterwards, and returns ``(arrays, y)``. Chainer and MXNet need an older NumPy
than nbnorm, so this file is also a program without nbnorm: ``python convention_hosts.py`` reads
lines ``["chainer", "given.npz", "result.npz"]`` and answers each with ``done``.
"""

import json
import os
import sys
import tempfile

import numpy as np


def torch(options, arrays, batches, x):
    import torch

    channels = x.shape[1]
    dtype = torch.from_numpy(x).dtype
    module = torch.nn.BatchNorm2d(channels, dtype=dtype, **options)
    module.load_state_dict({name: torch.as_tensor(array) for name, array in arrays.items()})
    for batch in batches:
        module(torch.from_numpy(batch))
    y = module.eval()(torch.from_numpy(x))
    return {n: a.numpy().copy() for n, a in module.state_dict().items()}, y.detach().numpy()


def keras(options, arrays, batches, x):
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    import keras

    layer = keras.layers.BatchNormalization(dtype=x.dtype.name, **options)
    layer.build(x.shape)
    assert [weight.name for weight in layer.weights] == list(arrays)
    layer.set_weights(list(arrays.values()))
    for batch in batches:
        layer(batch, training=True)
    y = keras.ops.convert_to_numpy(layer(x, training=False))
    names = [weight.name for weight in layer.weights]
    return dict(zip(names, layer.get_weights(), strict=True)), y


def flax(options, arrays, batches, x):
    import jax

    with jax.enable_x64(x.dtype == np.float64):
        return _flax(options, arrays, batches, x)


def _flax(options, arrays, batches, x):
    import flax.linen

    layer = flax.linen.BatchNorm(**options)
    variables = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        variables["batch_stats" if name in ("mean", "var") else "params"][name] = array
    for batch in batches:
        _, moved = layer.apply(variables, batch, use_running_average=False, mutable=["batch_stats"])
        variables |= moved
    y = layer.apply(variables, x, use_running_average=True)
    held = variables["params"] | variables["batch_stats"]
    return {name: np.array(array) for name, array in held.items()}, np.asarray(y)


def onnx(options, arrays, batches, x):
    import onnx
    import onnx.reference

    schema = onnx.defs.get_schema("BatchNormalization")
    names = [parameter.name for parameter in schema.inputs]
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)

    def run(batch, training):
        outputs = ["Y", "running_mean", "running_var"] if training else ["Y"]
        node = onnx.helper.make_node(
            "BatchNormalization", names, outputs, training_mode=int(training), **options
        )
        inputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name in names]
        results = [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = onnx.helper.make_graph([node], "batch norm", inputs, results)
        session = onnx.reference.ReferenceEvaluator(onnx.helper.make_model(graph))
        return session.run(None, {"X": batch} | arrays)

    for batch in batches:
        _, mean, var = run(batch, True)
        arrays = arrays | {"input_mean": mean, "input_var": var}
    return arrays, run(x, False)[0]


def chainer(options, arrays, batches, x):
    import chainer

    link = chainer.links.BatchNormalization(arrays["avg_mean"].shape, dtype=x.dtype, **options)
    chainer.serializers.NpzDeserializer(arrays).load(link)
    for batch in batches:
        link(batch)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        y = link(x).array
    saved = chainer.serializers.DictionarySerializer()
    saved.save(link)
    return {name: np.array(array) for name, array in saved.target.items()}, y


def mxnet(options, arrays, batches, x):
    """Run the operator; names and arrays are those of a symbol's checkpoint, with its tags."""
    import mxnet

    symbol = mxnet.sym.BatchNorm(mxnet.sym.Variable("data"), name="bn", **options)
    _, *parameters = symbol.list_arguments()
    states = symbol.list_auxiliary_states()
    held = {n: mxnet.nd.array(arrays[n], dtype=x.dtype) for n in (*parameters, *states)}

    # Do not use the symbol's executor: with oneDNN it does not update float32 statistics.
    for batch in batches:
        data = mxnet.nd.array(batch, dtype=x.dtype)
        data.attach_grad()
        with mxnet.autograd.record():
            y = mxnet.nd.BatchNorm(data, *held.values(), **options)
        y.backward()  # this updates the statistics
    y = mxnet.nd.BatchNorm(mxnet.nd.array(x, dtype=x.dtype), *held.values(), **options)
    with tempfile.TemporaryDirectory() as folder:
        of_arguments, of_states = ({n: held[n] for n in names} for names in (parameters, states))
        mxnet.model.save_checkpoint(folder + "/model", 0, symbol, of_arguments, of_states)
        saved = mxnet.nd.load(folder + "/model-0000.params")
    return {name: array.asnumpy() for name, array in saved.items()}, y.asnumpy()


def gluon(options, arrays, batches, x):
    import mxnet

    layer = mxnet.gluon.nn.BatchNorm(in_channels=len(arrays["gamma"]), **options)
    layer.initialize()
    layer.cast(x.dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = folder + "/layer.params"
        held = {name: mxnet.nd.array(array, dtype=x.dtype) for name, array in arrays.items()}
        mxnet.nd.save(file, held)
        layer.load_parameters(file)
        for batch in batches:
            with mxnet.autograd.record():
                y = layer(mxnet.nd.array(batch, dtype=x.dtype))
            y.backward()
        y = layer(mxnet.nd.array(x, dtype=x.dtype))
        layer.save_parameters(file)
        saved = mxnet.nd.load(file)
    return {name: array.asnumpy() for name, array in saved.items()}, y.asnumpy()


def write(path, options, arrays, batches, x):
    """Write the arguments of a function above."""
    numbered = {f"batch {i}": batch for i, batch in enumerate(batches)}
    held = {f"array {name}": array for name, array in arrays.items()}
    np.savez(path, options=json.dumps(options), x=x, **numbered, **held)


def read(path):
    """Return what `write` wrote."""
    with np.load(path) as file:
        names = [name for name in file if name.startswith("array ")]
        batches = [file[name] for name in sorted(file) if name.startswith("batch ")]
        arrays = {name[len("array ") :]: file[name] for name in names}
        return json.loads(file["options"].item()), arrays, batches, file["x"]


if __name__ == "__main__":
    for line in sys.stdin:
        host, given, result = json.loads(line)
        arrays, y = globals()[host](*read(given))
        write(result, {}, arrays, [], y)
        print("done", flush=True)

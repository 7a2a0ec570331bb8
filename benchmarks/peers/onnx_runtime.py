"""onnxruntime: inference by a model of one BatchNormalization, into existing memory."""

import numba
import numpy as np

from benchmarks.peers.batch import EPS, Batch, Call, LeftOut, Peer


def peer() -> Peer:
    return Peer({"inference": _inference}, reuse=True, library="onnxruntime")


def _model(b: Batch) -> bytes:
    try:
        from onnx import helper
    except ImportError:
        raise LeftOut("onnx, which writes its model, is not installed") from None

    def tensor(name: str, array: np.ndarray):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, array.shape)

    inputs = {"x": b.x, "gamma": b.gamma, "beta": b.beta, "mean": b.gamma, "var": b.gamma}
    node = helper.make_node("BatchNormalization", list(inputs), ["y"], epsilon=EPS)
    graph = helper.make_graph(
        [node], "inference", [tensor(*item) for item in inputs.items()], [tensor("y", b.x)]
    )
    # The current version of the operator, and a version of the file format that has it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return model.SerializeToString()


def _inference(b: Batch) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = numba.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            _model(b), options, providers=["CPUExecutionProvider"]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        raise LeftOut(f"onnxruntime has no kernel for {b.x.dtype.name}") from None
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    binding = session.io_binding()
    arrays = b.x, b.gamma, b.beta, b.running_mean, b.running_var
    for argument, array in zip(session.get_inputs(), arrays, strict=True):
        binding.bind_ortvalue_input(argument.name, value(array))
    binding.bind_ortvalue_output("y", value(b.out))

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return b.out

    return call

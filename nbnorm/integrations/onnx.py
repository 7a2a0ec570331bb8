"""ONNX: `BatchNormalization` for the reference evaluator, a `Backend` that uses it, and `fold`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, defs, helper
from onnx.backend.base import Backend as _Backend
from onnx.backend.base import BackendRep
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from nbnorm._frame import Frame
from nbnorm._typing import NDArray
from nbnorm.functional import batch_norm_forward, batch_norm_inference, batch_norm_stats
from nbnorm.integrations._onnx_fold import fold

__all__ = ["Backend", "BatchNormalization", "fold"]

fold.__module__ = __name__  # for help and pickling, rather than the private module


class BatchNormalization(OpRun):
    """Operator for ``ReferenceEvaluator(model, new_ops=[BatchNormalization])``.

    y = scale (x - mean) / sqrt(var + epsilon) + B, with the mean and biased variance of the batch
    in training, the given ones otherwise. In training,

    running_mean = momentum mean + (1 - momentum) batch mean,
    running_var = momentum var + (1 - momentum) biased batch variance.

    ONNX's momentum is the weight of the *old* statistic.

    The operator set that a model imports determines the version of the operator:

    ============  ==============================  ================================================
    operator set  training mode                   outputs in training
    ============  ==============================  ================================================
    1, 6          unless ``is_test``              y, mean, var, saved_mean, saved_var
    7, 9          if it has outputs besides y     y, mean, var, saved_mean, saved_var
    14, 15        if ``training_mode``            y, running_mean, running_var
    ============  ==============================  ================================================

    saved_mean and saved_var are the statistics of the batch. ``spatial=0`` (before 9) keeps
    separate statistics for every activation, in arrays of shape (C, D1, ..., Dn). From 9 on, an x
    of shape (N,) is treated as one of shape (N, 1).

    x, parameters and statistics may have different dtypes: float16, bfloat16, float32 or float64.
    y has x's dtype; the statistics have the dtypes of mean and var.

    Raises
    ------
    TypeError
        When run: an array has another dtype.
    ValueError
        When run: parameters or statistics do not fit x.

    Notes
    -----
    Implements Algorithm 1 of Ioffe & Szegedy (2015) as in the `operator's specification
    <https://onnx.ai/onnx/operators/onnx__BatchNormalization.html>`_. Statistics are summed in
    float64 for all dtypes of x. An empty batch does not change the running statistics.

    The evaluator does not pass `new_ops` to functions defined in a model; `Backend` does.

    ONNX's own operator (1.23) deviates from the specification before operator set 14: in 9 to 13
    it normalises with a mixture of the given and the batch's statistics, and in 7 and 8 it fails.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx.reference import ReferenceEvaluator
    >>> from onnx.parser import parse_model
    >>> from nbnorm.integrations.onnx import BatchNormalization
    >>> model = parse_model('''
    ...     <ir_version: 8, opset_import: ["": 15]>
    ...     example (float[N, C] x, float[C] s, float[C] b, float[C] mean, float[C] var)
    ...         => (float[N, C] y) { y = BatchNormalization(x, s, b, mean, var) }
    ... ''')
    >>> evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization])
    >>> one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    >>> x = np.array([[1], [2]], np.float32)
    >>> [y] = evaluator.run(None, {"x": x, "s": one, "b": zero, "mean": one, "var": one})
    >>> y.round(3)
    array([[0.],
           [1.]], dtype=float32)
    """

    def __init__(self, onnx_node: NodeProto, run_params: dict[str, Any]) -> None:
        # The evaluator uses one class for all versions, but attribute defaults depend on them.
        version = run_params["opsets"][onnx_node.domain]
        schema = defs.get_schema("BatchNormalization", version, onnx_node.domain)
        self._version = schema.since_version
        self._names = [declared.name for declared in schema.inputs]
        super().__init__(onnx_node, run_params, schema)

    def _run(
        self,
        x: NDArray,
        scale: NDArray,
        bias: NDArray,
        mean: NDArray,
        var: NDArray,
        **attributes: Any,
    ) -> tuple[NDArray, ...]:
        """Return y and, in training, the statistics."""
        shape = x.shape
        if x.ndim == 1 and self._version >= 9:
            x = x[:, np.newaxis]
        axis = 1 if attributes.get("spatial", 1) else tuple(range(1, x.ndim))
        eps = attributes["epsilon"]
        frame = Frame(x, axis)  # check here, so that errors use the operator's argument names
        for name, array in zip(self._names[1:], (scale, bias, mean, var), strict=True):
            frame.required_per_channel(array, name)
        if not self._trains(attributes):
            y = batch_norm_inference(x, scale, bias, mean, var, eps=eps, axis=axis)
            return (y.reshape(shape),)
        mean, var = mean.copy(), var.copy()
        momentum = 1.0 - float(attributes["momentum"])  # weight of the new statistic
        y, *_ = batch_norm_forward(
            x, scale, bias, mean, var, momentum=momentum, eps=eps, correction=0, axis=axis
        )
        results = y.reshape(shape), mean, var
        if not any(self.output[3:]):
            return results
        batch = batch_norm_stats(x, axis=axis)
        return *results, batch.mean.astype(x.dtype), batch.var().astype(x.dtype)

    def _trains(self, attributes: Mapping[str, Any]) -> bool:
        """Return True if the node is in training mode."""
        if self._version >= 14:
            return bool(attributes["training_mode"])
        if self._version >= 7:
            return any(self.output[1:])
        return not attributes["is_test"]


class Backend(_Backend):
    """ONNX backend that runs models in the reference evaluator with nbnorm's `BatchNormalization`.

    All other operators are the evaluator's own, in NumPy. The only device is "CPU".

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import helper
    >>> from nbnorm.integrations.onnx import Backend
    >>> node = helper.make_node("BatchNormalization", ["x", "s", "b", "mean", "var"], ["y"])
    >>> one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    >>> x = np.array([[1], [2]], np.float32)
    >>> [y] = Backend.run_node(node, [x, one, zero, one, one])
    >>> y.round(3)
    array([[0.],
           [1.]], dtype=float32)
    """

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Return whether models can run on a device.

        Parameters
        ----------
        device : str
            ONNX's name of the device: "CPU", "CUDA", "CUDA:1".

        Returns
        -------
        bool
            True for the CPU, False for all others.
        """
        return device.partition(":")[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Return whether `prepare` accepts a model.

        Parameters
        ----------
        model : ModelProto
            Any model.
        device : str, default "CPU"
            As in `supports_device`.
        **kwargs
            Part of the interface; ignored.

        Returns
        -------
        bool
            True if every operator has an implementation and the device is the CPU.
        """
        if not cls.supports_device(device):
            return False
        try:
            _Evaluator(model)
        except RuntimeError:  # an operator is not implemented, or its operator set not imported
            return False
        return True

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Load a model, which can then be run many times.

        Parameters
        ----------
        model : ModelProto
            The model to load; `onnx.checker` validates it first.
        device : str, default "CPU"
            As in `supports_device`.
        **kwargs
            Part of the interface; ignored.

        Returns
        -------
        BackendRep
            Its method ``run(inputs)`` takes a sequence of arrays, one per graph input without an
            initializer, in order, or a mapping of input names to arrays. It returns a tuple of
            the graph's outputs.

        Raises
        ------
        ValueError
            The device is not the CPU.
        onnx.checker.ValidationError
            The model is invalid.
        NotImplementedError
            The model has an operator that the evaluator does not implement.
        """
        cls._check(device)
        super().prepare(model, device, **kwargs)
        given = {tensor.name for tensor in model.graph.initializer}
        given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
        names = [value.name for value in model.graph.input if value.name not in given]
        return _Prepared(_Evaluator(model), names)

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Sequence[NDArray] | Mapping[str, NDArray],
        device: str = "CPU",
        outputs_info: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run one operator.

        Parameters
        ----------
        node : NodeProto
            The operator, in ONNX's default domain.
        inputs : sequence of array, or mapping of str to array
            Inputs of the node, in order or by name.
        device : str, default "CPU"
            As in `supports_device`.
        outputs_info : optional
            Part of the interface; ignored.
        **kwargs
            ``opset_version`` is the operator set; by default the latest that onnx supports.

        Returns
        -------
        tuple of array
            The node's outputs.

        Raises
        ------
        ValueError, onnx.checker.ValidationError, NotImplementedError
            As in `prepare`.
        """
        cls._check(device)
        super().run_node(node, inputs, device, outputs_info, **kwargs)
        version = helper.make_opsetid("", kwargs.get("opset_version", defs.onnx_opset_version()))
        names, results = ([name for name in side if name] for side in (node.input, node.output))
        function = helper.make_function("", node.op_type, names, results, [node], [version])
        return _Prepared(_Evaluator(function), names, attributes={}).run(inputs)

    @classmethod
    def _check(cls, device: str) -> None:
        """Raise if the device is not the CPU."""
        if not cls.supports_device(device):
            raise ValueError(f"device is {device!r}, expected 'CPU'")


class _Evaluator(ReferenceEvaluator):
    """The reference evaluator with nbnorm's operator, including in functions of a model."""

    def __init__(self, *args: Any, new_ops: Any = None, **options: Any) -> None:
        # The evaluator creates instances of its own class, with new_ops for branches of control
        # flow and without for functions. The argument is therefore always set here.
        super().__init__(*args, new_ops=[BatchNormalization], **options)


class _Prepared(BackendRep):
    """An evaluator with the names of the inputs that it needs."""

    def __init__(self, evaluator: ReferenceEvaluator, names: list[str], **options: Any) -> None:
        self._evaluator, self._names, self._options = evaluator, names, options

    def run(
        self, inputs: Sequence[NDArray] | Mapping[str, NDArray], **kwargs: Any
    ) -> tuple[Any, ...]:
        """Return the outputs."""
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self._names):
                raise ValueError(
                    f"got {len(inputs)} inputs, expected {len(self._names)}: {self._names}"
                )
            inputs = dict(zip(self._names, inputs, strict=True))
        return tuple(self._evaluator.run(None, dict(inputs), **self._options))

"""ONNX: the operator `BatchNormalization` for the reference evaluator, and a `Backend` with it."""

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

__all__ = ["Backend", "BatchNormalization"]


class BatchNormalization(OpRun):
    """The operator for ``ReferenceEvaluator(model, new_ops=[BatchNormalization])``.

    y = scale (x - mean) / sqrt(var + epsilon) + B, with the mean and the biased variance of the
    batch in training, the given ones otherwise. In training

    running_mean = momentum mean + (1 - momentum) batch mean,
    running_var = momentum var + (1 - momentum) biased batch variance:

    ONNX's momentum is the weight of the *old* statistic.

    Which version of the operator a node means follows from the operator set that its model imports:

    ============  ==============================  ================================================
    operator set  trains                          results in training
    ============  ==============================  ================================================
    1, 6          unless ``is_test``              y, mean, var, saved_mean, saved_var
    7, 9          where there is more than y      y, mean, var, saved_mean, saved_var
    14, 15        where ``training_mode``         y, running_mean, running_var
    ============  ==============================  ================================================

    saved_mean and saved_var are those of the batch; ``spatial=0`` (before 9) keeps statistics of
    every activation, in arrays of shape (C, D1, ..., Dn). Since 9 an x of shape (N,) is one of
    shape (N, 1).

    x, parameters and statistics may each have their own dtype of float16, bfloat16, float32 and
    float64; y has that of x, statistics have that of mean and var.

    Raises
    ------
    TypeError
        When run: arrays of other dtypes.
    ValueError
        When run: parameters or statistics that do not fit x.

    Notes
    -----
    Ioffe & Szegedy (2015), Algorithm 1; the `operator's specification
    <https://onnx.ai/onnx/operators/onnx__BatchNormalization.html>`_. Statistics are summed in
    float64, whatever x is. An empty batch leaves the running statistics as they are.

    The evaluator does not hand `new_ops` on to functions that a model defines; `Backend` does.

    ONNX's own operator (1.23) departs from the specification before operator set 14: of 9 to 13 it
    normalises by a mixture of the given and the batch's statistics, and in 7 and 8 it fails.

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
        # The evaluator has one class for all versions, and defaults of attributes are a version's.
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
        """Return y, and in training the statistics."""
        shape = x.shape
        if x.ndim == 1 and self._version >= 9:
            x = x[:, np.newaxis]
        axis = 1 if attributes.get("spatial", 1) else tuple(range(1, x.ndim))
        eps = attributes["epsilon"]
        frame = Frame(x, axis)  # which refuses arrays under the names that the operator has
        for name, array in zip(self._names[1:], (scale, bias, mean, var), strict=True):
            frame.required(array, name)
        if not self._trains(attributes):
            y = batch_norm_inference(x, scale, bias, mean, var, eps=eps, axis=axis)
            return (y.reshape(shape),)
        mean, var = mean.copy(), var.copy()
        momentum = 1.0 - float(attributes["momentum"])  # of the new statistic
        y, *_ = batch_norm_forward(
            x, scale, bias, mean, var, momentum=momentum, eps=eps, correction=0, axis=axis
        )
        results = y.reshape(shape), mean, var
        if not any(self.output[3:]):
            return results
        batch = batch_norm_stats(x, axis=axis)
        return *results, batch.mean.astype(x.dtype), batch.var().astype(x.dtype)

    def _trains(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the node is in training mode."""
        if self._version >= 14:
            return bool(attributes["training_mode"])
        if self._version >= 7:
            return any(self.output[1:])
        return not attributes["is_test"]


class Backend(_Backend):
    """ONNX's backend interface: models run by the reference evaluator, `BatchNormalization` by us.

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
        """Whether models can run there.

        Parameters
        ----------
        device : str
            ONNX's "CPU", "CUDA", "CUDA:1".

        Returns
        -------
        bool
            True for the CPU.
        """
        return device.partition(":")[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether `prepare` takes this model.

        Parameters
        ----------
        model : ModelProto
            Any model.
        device : str, default "CPU"
            As in `supports_device`.
        **kwargs
            Of the interface; not used.

        Returns
        -------
        bool
            Whether every operator has an implementation, and the device is the CPU.
        """
        if not cls.supports_device(device):
            return False
        try:
            _Evaluator(model)
        except RuntimeError:  # no implementation, or an operator set that is not imported
            return False
        return True

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Load a model to run it as often as wanted.

        Parameters
        ----------
        model : ModelProto
            What to run; `onnx.checker` looks at it first.
        device : str, default "CPU"
            As in `supports_device`.
        **kwargs
            Of the interface; not used.

        Returns
        -------
        BackendRep
            ``run(inputs)`` takes arrays, one for each input of the graph that no initializer
            gives, in their order, or a mapping from names of inputs to arrays; it returns a tuple
            of the graph's outputs.

        Raises
        ------
        ValueError
            Another device than the CPU.
        onnx.checker.ValidationError
            The model is none.
        NotImplementedError
            It has an operator that the evaluator has not.
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
            The operator, of ONNX's own domain.
        inputs : sequence of array, or mapping of str to array
            Those that the node has, in their order, or by name.
        device : str, default "CPU"
            As in `supports_device`.
        outputs_info : optional
            Of the interface; not used.
        **kwargs
            ``opset_version``, the operator set; by default the latest that onnx has.

        Returns
        -------
        tuple of array
            The node's outputs.

        Raises
        ------
        ValueError, onnx.checker.ValidationError, NotImplementedError
            As `prepare`.
        """
        cls._check(device)
        super().run_node(node, inputs, device, outputs_info, **kwargs)
        version = helper.make_opsetid("", kwargs.get("opset_version", defs.onnx_opset_version()))
        names, results = ([name for name in side if name] for side in (node.input, node.output))
        function = helper.make_function("", node.op_type, names, results, [node], [version])
        return _Prepared(_Evaluator(function), names, attributes={}).run(inputs)

    @classmethod
    def _check(cls, device: str) -> None:
        """Refuse what is not the CPU."""
        if not cls.supports_device(device):
            raise ValueError(f"device is {device!r}, expected 'CPU'")


class _Evaluator(ReferenceEvaluator):
    """The reference evaluator with our operator, in functions that a model defines as well."""

    def __init__(self, *args: Any, new_ops: Any = None, **options: Any) -> None:
        # It makes evaluators of its own class: of branches with new_ops, of functions without.
        super().__init__(*args, new_ops=[BatchNormalization], **options)


class _Prepared(BackendRep):
    """An evaluator, and the names of the inputs that it is run with."""

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

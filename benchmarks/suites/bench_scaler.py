"""asv: nbnorm's replacement of scikit-learn's scaler; skipped if scikit-learn is not installed."""

import numpy as np


class Scaler:
    """Fitting a table, or transforming it with the fitted statistics."""

    params = (["fit", "transform"], ["float32", "float64"], ["100000x100", "100x10"])
    param_names = ("op", "dtype", "shape")

    def setup(self, op, dtype, name):
        try:
            from nbnorm.integrations.sklearn import StandardScaler
        except ImportError as error:
            raise NotImplementedError("scikit-learn is not installed") from error
        rng = np.random.default_rng(0)
        x = rng.normal(3.0, 2.0, size=tuple(map(int, name.split("x")))).astype(dtype)
        scaler = StandardScaler().fit(x)
        self.call = getattr(scaler, op)
        self.x = x
        self.call(x)

    def time_op(self, op, dtype, name):
        self.call(self.x)


class PartialFit:
    """A hundred calls with a hundred rows each."""

    params = (["float32", "float64"],)
    param_names = ("dtype",)

    def setup(self, dtype):
        try:
            from nbnorm.integrations.sklearn import StandardScaler
        except ImportError as error:
            raise NotImplementedError("scikit-learn is not installed") from error
        self.new = StandardScaler
        x = np.random.default_rng(0).normal(3.0, 2.0, size=(100, 100, 20)).astype(dtype)
        self.chunks = list(x)
        self.time_chunks(dtype)

    def time_chunks(self, dtype):
        scaler = self.new()
        for chunk in self.chunks:
            scaler.partial_fit(chunk)

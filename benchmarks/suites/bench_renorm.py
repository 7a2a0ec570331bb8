"""asv: batch renormalization and batch normalization, debiasing, and mixed precision."""

import numpy as np

import nbnorm


class Renorm:
    """A training forward or backward, with and without r and d."""

    params = (["forward", "backward"], ["batch norm", "renorm"], ["32x64x56x56", "256x512"])
    param_names = ("op", "kind", "shape")

    def setup(self, op, kind, name):
        rng = np.random.default_rng(0)
        shape = tuple(map(int, name.split("x")))
        x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
        gamma, beta, mean, var = np.ones((4, shape[1]), np.float32)
        out = np.empty_like(x)
        renorm = kind == "renorm"
        forward = nbnorm.batch_renorm_forward if renorm else nbnorm.batch_norm_forward
        backward = nbnorm.batch_renorm_backward if renorm else nbnorm.batch_norm_backward
        self.call = lambda: forward(x, gamma, beta, mean, var, out=out)
        _, *saved = self.call()
        if op == "backward":
            self.call = lambda: backward(dy, x, gamma, *saved, out=out)
        self.call()

    def time_op(self, op, kind, name):
        self.call()


class Debias:
    """An update of running statistics, debiased or not."""

    params = ([None, 3],)
    param_names = ("num_batches_tracked",)

    def setup(self, batches):
        self.running = np.zeros(512, np.float32), np.ones(512, np.float32)
        self.moments = nbnorm.batch_norm_stats(np.random.default_rng(0).normal(size=(32, 512)))

    def time_update(self, batches):
        nbnorm.update_running_stats(*self.running, self.moments, num_batches_tracked=batches)


class MixedPrecision:
    """BN + residual + ReLU of a float16 x, the residual in float16 or float32."""

    params = (["float16", "float32"],)
    param_names = ("residual",)

    def setup(self, dtype):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(32, 64, 56, 56)).astype(np.float16)
        residual, out = x.astype(dtype), np.empty_like(x)
        self.call = lambda: nbnorm.batch_norm_forward(
            x, residual=residual, activation="relu", out=out
        )
        self.call()

    def time_forward(self, dtype):
        self.call()

"""asv: one pass over one tensor, for every shape, channels first and last, results in place.

Data is drawn and kernels are compiled in `setup`, outside the timing.
"""

from benchmarks.peers import PEERS, Batch
from benchmarks.shapes import SHAPES, name_of, shape_of

LAYOUTS = {"channels-first": "nbnorm", "channels-last": "nbnorm channels-last"}


class _Pass:
    """A pass of float32; the subclass says which."""

    params = (list(map(name_of, SHAPES)), list(LAYOUTS))
    param_names = ("shape", "layout")
    op: str

    def setup(self, name, layout):
        shape = shape_of(name)
        if layout == "channels-last" and len(shape) == 2:
            raise NotImplementedError("(N, C) has one layout")
        peer = PEERS[LAYOUTS[layout]]
        self.call = getattr(peer, self.op)(Batch(shape, last=peer.last))
        self.call()

    def time_pass(self, name, layout):
        self.call()


class Forward(_Pass):
    op = "forward"


class Backward(_Pass):
    op = "backward"


class Inference(_Pass):
    op = "inference"


class Memory:
    """Most memory the process ever had: a hidden copy of the largest tensor, 103 MB, would show."""

    params = (["32x256x56x56", "16x3x512x512"], ["forward", "backward", "inference"])
    param_names = ("shape", "op")

    def setup(self, name, op):
        self.call = getattr(PEERS["nbnorm"], op)(Batch(shape_of(name)))

    def peakmem_pass(self, name, op):
        self.call()

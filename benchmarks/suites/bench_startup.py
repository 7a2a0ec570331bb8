"""asv: time that a program takes before its first result, in separate processes."""

import subprocess
import sys
from tempfile import TemporaryDirectory, mkdtemp

from benchmarks.shapes import shape_of

# The library is imported and the arrays exist; nothing is compiled or loaded yet.
BEFORE = """
import os
os.environ["NUMBA_CACHE_DIR"] = {folder!r}
import numpy, nbnorm
x = numpy.ones({shape}, "float32")
"""
CALLS = """
y, mean, rstd = nbnorm.batch_norm_forward(x)
nbnorm.batch_norm_backward(y, x, None, mean, rstd)
"""


class Import:
    """Import of nbnorm, and of Numba, which takes most of it: subtract the second."""

    number = 1
    rounds = 1
    warmup_time = 0

    def timeraw_nbnorm(self):
        return "import nbnorm"

    def timeraw_numba(self):
        return "import numpy, numba"


class FirstCall:
    """First forward and backward, of a small shape and of a shape that uses threads.

    cold: no kernel is cached on disk; warm: an earlier process has cached them.
    """

    params = (["cold", "warm"], ["60x100", "8x16x64x64"])
    param_names = ("cache", "shape")
    number = 1
    repeat = 3
    rounds = 1
    warmup_time = 0
    timeout = 300

    def setup(self, cache, name):
        self.folder = TemporaryDirectory()
        if cache == "warm":
            subprocess.run([sys.executable, "-c", self.before(name) + CALLS], check=True)

    def teardown(self, cache, name):
        self.folder.cleanup()

    def before(self, name, *, empty=False):
        folder = mkdtemp(dir=self.folder.name) if empty else self.folder.name
        return BEFORE.format(folder=folder, shape=shape_of(name))

    def timeraw_first_call(self, cache, name):
        return CALLS, self.before(name, empty=cache == "cold")

"""Every kernel compiles to efficient machine code for sm_80 and sm_90a.

Needs the CUDA toolchain, but neither GPU nor driver.
"""

from importlib.util import find_spec
from itertools import product

import pytest

NEEDED = {
    "numba_cuda": "numba-cuda",
    "cupy": "CuPy",
    "cuda.pathfinder": "cuda-pathfinder",
    "nvidia.cu13": "the CUDA toolkit's packages (nvidia-*)",
}


def _missing():
    """Return which part of the toolchain is missing, or None."""
    for module, name in NEEDED.items():
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed"
    from cuda.pathfinder import find_nvidia_binary_utility

    for tool in ("cuobjdump", "nvdisasm"):
        if find_nvidia_binary_utility(tool) is None:
            return f"{tool} is not installed"
    return None


if reason := _missing():
    pytest.skip(reason, allow_module_level=True)

from numba import cuda  # noqa: E402
from numba.cuda import types  # noqa: E402
from offline import FLOAT32, code_of, compiled, problems, ptx_of  # noqa: E402

import nbnorm  # noqa: E402
from nbnorm.activations import TABLE, inverse_of  # noqa: E402
from nbnorm.cuda import kernels  # noqa: E402
from nbnorm.cuda.intrinsics import STORAGE  # noqa: E402
from nbnorm.cuda.jit import kernel  # noqa: E402
from nbnorm.cuda.plan import THREADS, VECTOR  # noqa: E402

TRAVERSALS = ("rows", "columns")
READ = {"stats": 1, "apply": 2, "backward_reduce": 3, "backward_apply": 3}  # tensors
READ |= {"second_reduce": 3, "second_apply": 3}
WRITTEN = {"stats": 0, "apply": 1, "backward_reduce": 0, "backward_apply": 2}
ACTIVATED = ("apply", "backward_reduce", "backward_apply")
WRITTEN |= {"second_reduce": 0, "second_apply": 2}
KEPT_READ, KEPT_WRITTEN = {"forward": 2, "backward": 3}, {"forward": 1, "backward": 2}


def passes():
    """Yield traversal, pass, dtype, width and the dtype of gamma and beta."""
    for dtype, storage in STORAGE.items():
        for width, traversal, name in product((VECTOR // storage.itemsize, 1), TRAVERSALS, READ):
            yield traversal, name, dtype, width, "float32"
            if dtype == "float64" and name != "stats" and "second" not in name:
                yield traversal, name, dtype, width, "float64"


def assert_lean(codes, of, **expected):
    found = {name: problems(code, of, **expected) for name, code in codes.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize(("traversal", "name", "dtype", "width", "parameters"), list(passes()))
def test_a_pass_stays_in_registers_and_moves_vectors(traversal, name, dtype, width, parameters):
    of = getattr(kernels.build(traversal, dtype, width), name)
    codes = compiled(of, dtype, parameters)
    assert_lean(codes, of, width=width, loads=READ[name], stores=WRITTEN[name])


WIDE = {
    "apply": ("residual",), "backward_reduce": ("dy",), "backward_apply": ("dy",),
    "second_reduce": ("ddx", "dy"), "second_apply": ("ddx", "dy"),
}  # fmt: skip


@pytest.mark.parametrize(("traversal", "name"), list(product(TRAVERSALS, WIDE)))
def test_float32_beside_halves_is_read_in_vectors(traversal, name):
    """Eight values are one vector of halves and two of float32."""
    of = getattr(kernels.build(traversal, "float16", 8, None, WIDE[name]), name)
    codes = compiled(of, "float16", "float32")
    loads = READ[name] + len(WIDE[name])
    assert_lean(codes, of, width=8, loads=loads, stores=WRITTEN[name])


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize(("name", "wide"), [("forward", "residual"), ("backward", "dy")])
def test_float32_beside_halves_that_are_kept(traversal, name, wide):
    of = getattr(kernels.fused(traversal, "bfloat16", 8, True, None, (wide,)), name)
    codes = compiled(of, "bfloat16", "float32", ("sm_90a",))
    assert_lean(codes, of, width=8, loads=KEPT_READ[name] + 1, stores=KEPT_WRITTEN[name])


@pytest.mark.parametrize("activation", TABLE)
@pytest.mark.parametrize(("traversal", "name"), list(product(TRAVERSALS, ACTIVATED)))
def test_passes_with_activations_stay_in_registers_too(traversal, name, activation):
    of = getattr(kernels.build(traversal, "float32", 4, nbnorm.activation(activation)), name)
    codes = compiled(of, "float32", "float32", ("sm_90a",))
    assert_lean(codes, of, width=4, loads=READ[name], stores=WRITTEN[name])


def weighted_passes():
    """Yield pass, dtype, and the dtypes of gamma and beta and of weights."""
    for name, (dtype, storage) in product(WRITTEN, STORAGE.items()):
        if "second" not in name:
            yield name, dtype, "float32", "uint8"
            if storage.itemsize >= 4:
                yield name, dtype, dtype, dtype


@pytest.mark.parametrize(("name", "dtype", "parameters", "weights"), list(weighted_passes()))
def test_a_pass_with_weights_stays_in_registers(name, dtype, parameters, weights):
    of = getattr(kernels.weighted(dtype), name)
    codes = compiled(of, dtype, parameters, weights=weights)
    assert_lean(codes, of, width=1, loads=READ[name], stores=WRITTEN[name])


@pytest.mark.parametrize(("name", "activation"), list(product(ACTIVATED, ("gelu", "silu"))))
def test_a_pass_with_weights_and_an_activation_stays_in_registers_too(name, activation):
    of = getattr(kernels.weighted("float32", nbnorm.activation(activation)), name)
    codes = compiled(of, "float32", "float32", ("sm_90a",), weights="uint8")
    assert_lean(codes, of, width=1, loads=READ[name], stores=WRITTEN[name])


@pytest.mark.parametrize(("traversal", "name"), list(product(TRAVERSALS, ACTIVATED[1:])))
def test_passes_that_invert_an_activation_stay_in_registers_too(traversal, name):
    inverse = inverse_of(nbnorm.activation("leaky_relu"))
    of = getattr(kernels.build(traversal, "float32", 4, inverse), name)
    codes = compiled(of, "float32", "float64", ("sm_90a",))
    assert_lean(codes, of, width=4, loads=READ[name], stores=WRITTEN[name])


def kept_passes():
    """Yield traversal, pass, dtype and width of kernels that read memory once."""
    for dtype, storage in STORAGE.items():
        if storage.itemsize < 8:
            yield from product(TRAVERSALS, KEPT_READ, [dtype], (VECTOR // storage.itemsize, 1))


@pytest.mark.parametrize(("traversal", "name", "dtype", "width"), list(kept_passes()))
def test_what_reads_memory_once_stays_in_registers_too(traversal, name, dtype, width):
    of = getattr(kernels.fused(traversal, dtype, width, False), name)
    codes = compiled(of, dtype, "float32")
    assert_lean(codes, of, width=width, loads=KEPT_READ[name], stores=KEPT_WRITTEN[name])
    for code in codes.values():
        assert code.count("STS") >= width, "nothing is kept in shared memory"
        assert code.count("ST") + code.count("LD") == 0, "generic addresses access shared memory"
        assert code.count("LDG", "CONSTANT") == 0, "a cache that does not see writes is read"
        assert code.count("UCGABAR_WAIT") == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("traversal", "name"), list(product(TRAVERSALS, KEPT_READ)))
def test_blocks_of_a_cluster_wait_for_each_other_and_see_what_was_written(traversal, name, dtype):
    width = VECTOR // STORAGE[dtype].itemsize
    of = getattr(kernels.fused(traversal, dtype, width, True), name)
    (code,) = compiled(of, dtype, "float32", ("sm_90a",)).values()  # the first that has clusters
    assert_lean({"": code}, of, width=width, loads=KEPT_READ[name], stores=KEPT_WRITTEN[name])
    # Each occurs twice: writes become visible, all blocks arrive, and L1 drops its stale values.
    for instruction in ("MEMBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "CCTL"):
        assert code.count(instruction) == 2, instruction
    assert code.count("LDG", "CONSTANT") == 0


def fused_by_choice(of, dtype, weights=""):
    """Return sums and differences in PTX that the assembler could fuse with a product."""
    products, found = set(), []
    for line in ptx_of(of, dtype, "float32", weights).splitlines():
        match line.replace(",", "").rstrip(";").split():
            case [operation, result, *operands]:
                kind = operation.partition(".")[0]
                if kind == "mul" and operation.endswith(("f32", "f64")) and ".rn" not in operation:
                    products.add(result)
                elif kind in ("add", "sub") and products & set(operands):
                    found.append(line.strip())
    return found


@pytest.mark.parametrize("traversal", TRAVERSALS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_compiler_chooses_what_to_fuse(traversal, dtype):
    """Kernels that read memory once and those that read it twice must return the same bits."""
    width = VECTOR // STORAGE[dtype].itemsize
    separate = kernels.build(traversal, dtype, width)
    kept = kernels.fused(traversal, dtype, width, False)
    passes = [getattr(separate, name) for name in READ] + [kept.forward, kept.backward]
    once = kernels.finish_moments, kernels.second_table
    for of in (*passes, *once, kernels.finish_sums(dtype), kernels.finish_second_sums(dtype)):
        assert fused_by_choice(of, "float64" if of in once else dtype) == []


@pytest.mark.parametrize("weights", ["uint8", "float32"])
def test_no_compiler_chooses_what_to_fuse_with_weights(weights):
    for of in vars(kernels.weighted("float32")).values():
        assert fused_by_choice(of, "float32", weights) == []
    assert fused_by_choice(kernels.finish_weighted, "float64") == []


@pytest.mark.parametrize(
    ("of", "dtype"),
    [
        (kernels.finish_moments, "float64"),
        (kernels.finish_weighted, "float64"),
        (kernels.rstd_all, "float64"),
        (kernels.move, "float32"),
        (kernels.move, "float64"),
        (kernels.renorm_factors, "float64"),
        (kernels.second_table, "float64"),
        *((kernels.finish_sums(dtype), dtype) for dtype in STORAGE),
        *((kernels.finish_second_sums(dtype), dtype) for dtype in STORAGE),
    ],
    ids=lambda value: value if isinstance(value, str) else value.py_func.__name__,
)
def test_what_is_done_once_a_channel_stays_in_registers(of, dtype):
    assert_lean(compiled(of, dtype, dtype), of, width=1)


# -- the checks above find faults ----------------------------------------------------------------


def found_in(of):
    """Return the problems of a kernel of (float32 pointer, int64) on each architecture."""
    codes = code_of(of, (FLOAT32, types.int64))
    one, other = (
        " ".join(problems(code, of, width=4, loads=1, stores=1)) for code in codes.values()
    )
    return one, other


@kernel(8)  # 32 registers
def spilling(x, n):
    values = cuda.local.array(64, types.float32)
    for i in range(64):
        values[i] = x[cuda.threadIdx.x + i * n]
    cuda.syncthreads()
    for i in range(64):
        x[cuda.threadIdx.x * n + i] = values[i] * values[63 - i]


@kernel()
def indexing(x, n):
    values = cuda.local.array(64, types.float32)
    for i in range(64):
        values[i] = x[i * n] * i
    for i in range(64):
        values[i ^ n] += values[i]
    x[0] = values[n]


@kernel()
def plain(x, n):
    x[n] += 1


@kernel()
def undecided(x, n):
    x[0] = x[1] * x[2]
    x[3] = x[n] + x[1] * x[2]


def test_registers_that_spill_are_found():
    for problem in found_in(spilling):
        assert "accesses to local memory" in problem
        assert "bytes of stack" in problem


def test_an_index_known_only_at_run_time_is_found():
    for problem in found_in(indexing):
        assert "accesses to local memory" in problem


def test_a_product_that_may_be_fused_with_a_sum_is_found():
    assert fused_by_choice(undecided, None)


def test_scalar_loads_and_stores_are_found():
    for problem in found_in(plain):
        assert "fewer than 1 loads" in problem
        assert "fewer than 1 streaming stores" in problem
        assert "local memory" not in problem


def test_a_launch_bound_that_does_not_hold_is_found():
    codes = code_of(spilling, (FLOAT32, types.int64))
    narrow = kernel(65536 // (THREADS * 16))(plain.py_func)
    for code in codes.values():
        assert "registers, not 16" in " ".join(problems(code, narrow, width=1))

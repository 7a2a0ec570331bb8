"""Lines of nbnorm with a fault each, and the tests that must detect it: see mutate.py."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    original: str  # occurs once in the file
    mutated: str
    tests: str  # pytest arguments, relative to tests/
    reason: str = ""  # why no test can detect it


def of(file, *groups):
    """Return the mutants of a file, given as (tests, (original, mutated[, reason]), ...)."""
    return [
        Mutant(f"nbnorm/{file}.py", line[0], line[1], tests, *line[2:])
        for tests, *lines in groups
        for line in lines
    ]


LAYOUT = of(
    "_layout",
    (
        "test_layout.py",
        ("(n > 0 and C * S >= SAMPLE)", "C * S >= SAMPLE"),
        ("if any(stride % itemsize for stride in strides):", "if False:"),
        ("n > 0 and C * S >= SAMPLE", "n > 0"),
        ("(c > S and S >= PLANE)", "c > S"),
        ("(c > S and S >= PLANE)", "S >= PLANE"),
        ("(S == 1 or s == 1)", "s == 1"),
        ("(S == 1 or s == 1)", "True"),
        ("(C == 1 or c == S", "(c == S"),
        ("(N == 1 or n == C * S", "(n == C * S"),
        ("strides[outer] != strides[inner] * shape[inner]", "False"),
        (
            "if long[begin:end] != channels:",
            "if False:",
            "axes that are apart or out of order have no common stride; None only says so sooner",
        ),
        ("sum(i < channel_axes[0] for i in long)", "0"),
        ("shape[i] > 1 and strides[i] != expected", "strides[i] != expected"),
        ("if shape[i] > 1 and strides[i] != expected:", "if False:"),
    ),
)

SECOND_ORDER = [
    *of(
        "integrations/torch/_functional",
        (
            "integrations/test_torch_functional.py",
            (
                "_second_of(tx, tweight, tbias, None, c, *rest)",
                "_second_of(tx, None, tbias, None, c, *rest)",
            ),
            ("None if first is None or added is None else first + added", "first"),
        ),
    ),
    *of(
        "integrations/autograd",
        (
            "integrations/test_autograd.py",
            ("        through(dy),", "        dy,"),
            ("ddy = ddy + ddresidual", "pass"),
            ("dx + of_v.dx", "dx"),
            ("dgamma = dgamma + of_v.dgamma", "pass"),
            ("dv.astype(residual.dtype)", "dv.astype(x.dtype)"),
        ),
    ),
    *of(
        "second_order",
        (
            "test_second_order.py",
            ("if ddx_ is not None:", "if True:"),
            (
                "            if training:\n                backend.backward(",
                "            if True:\n                backend.backward(",
            ),
        ),
    ),
    *of(
        "cpu/second_order",
        (
            "test_second_order.py::test_numbers_beyond_float32_within",
            ("if second_lost(partial, k, c, grid, hi):", "if False:"),
            ("return some and abs(s_dg)", "return False and abs(s_dg)"),
            ("or not all_set(fits):", "or False:"),
            ("if fits[c - c0]:", "if True:", "second_apply64 writes the other channels again"),
        ),
    ),
    *of(
        "cpu/channel",
        (
            "test_second_order.py",
            ("return 0.0 if count == np.inf else total / count", "return total / count"),
            (
                "along = a_c * (mean_of(sum_dg[c], count) - 2 * d_xhat",
                "along = a_c * (mean_of(sum_dg[c], count) - d_xhat",
            ),
            ("t[c] = -(b_c * l + p_c * l_g) - lo * s_c", "t[c] = -(b_c * l) - lo * s_c"),
            ("q[c] = tbeta[c] - a_c * l - lo * p_c", "q[c] = tbeta[c] - a_c * l"),
        ),
    ),
]


FRAME = of(
    "_frame",
    (
        "test_streaming.py::test_unaligned_results_are_not_streamed_to",
        ("return self.memory.aligned(array) and (", "return (True) and ("),
    ),
    ("test_layout.py", ("turned[...] = target.written.reshape(turned.shape)", "pass")),
    (
        "test_arithmetic.py::test_running_statistics_forward_are_those_of_update",
        ("mean, m2, momentum, self.m - correction)", "mean, m2, momentum, self.m)"),
    ),
    (
        "test_results.py::test_bfloat16_parameters_give_bfloat16_gradients",
        ("self.x.dtype if gamma is None else gamma.dtype", "self.x.dtype"),
    ),
)

FROM_Y = of(
    "functional",
    (
        "test_from_y.py",
        ("        _checks.not_overwritten(frame.x, y_)", "        pass"),
        ("        _checks.divisor(scale, frame.x.dtype, on_host(rstd_))", "        pass"),
        ("return gamma * gamma * rstd", "return gamma * rstd"),
        ("beta, (rstd != 0) / gamma", "beta, 1 / gamma"),
        ("        _checks.invertible(activation, dtype=frame.x.dtype)", "        pass"),
        ("inverse_of(own) if own is not None and self.from_y else own", "own"),
        ("\"beta\", activation, y, from_y)", "\"beta\", activation, y)"),
        ('large, name = (y, "y") if from_y', 'large, name = (y, "x") if from_y'),
    ),
) + of(
    "_checks",
    (
        "test_from_y.py",
        ("return 510 if dtype == np.float64 else 126", "return 510"),
        ("if not 2.0**-bits <= value <= 2.0**bits", "if not value > 0"),
        ("np.where(rstd == 0, 1, scale * rstd)", "scale * rstd"),
        ("(size > 2.0**bits) & (size < np.inf)", "size > 2.0**bits"),
        ("(size < 2.0**-bits) |", "(size == 0) |"),
    ),
) + of(
    "layer",
    (
        "test_from_y.py",
        ('"out": x if self.inplace else None', '"out": None'),
        ("kept_x = None if self.inplace else x", "kept_x = x"),
        ("if self.training and \"weight\" in", "if \"weight\" in"),
        ('_checks.writable(taken, "x", _OVERWRITTEN)', "pass"),
    ),
) + of(
    "cpu/ordinary",
    ("test_from_y.py::test_y_in_the_memory_of_x",
     ("        and apart(bytes_of(x, site, size), bytes_of(y, site, size))", "        # ")),
)  # fmt: skip

SEGMENTS = of(
    "_segments",
    (
        "test_segments.py",
        ("described = \"a part of x of shape {}\"", "described = \"x of shape {}\""),
        ("in self._counts if count), default=0)", "in self._counts), default=0)"),
        ("if shape[first] > 1:  # the", "if False:  # the"),
        ("strides if fitting else None", "strides"),
        ('if name.startswith("running") or rank', "if rank"),
        ("if self._equal and self.weights is None:", "if self.weights is None:"),
        ("if len(shape) == len(self._of_part):", "if gamma is None:"),
        ("like = beta if gamma is None else gamma", "like = gamma"),
        ("and packed and len(set(counts)) == 1:", "and packed:"),
        ("            if end > begin:", "            if True:"),
        ("weight = slice(g * self._C, (g + 1) * self._C), count / total",
         "weight = slice(g * self._C, (g + 1) * self._C), 1 / len(self._counts)"),
        ("weight * (m2[c] / (count - correction))", "weight * (m2[c] / count)"),
        ("None if sums is None else count", "None"),
    ),
) + of(
    "_segments",
    (
        "cuda/test_simulator.py::test_simulated[test_segments]",
        ("packed = all(t.flags.c_contiguous for t in present)", "packed = True"),
    ),
) + of(
    "moments",
    (
        "test_segments.py",
        ("np.where(count == 0, mean_b, np.where(", "np.where(False, mean_b, np.where("),
        ("np.where((count == 0) | (count_b == 0), 0, d", "np.where(False, 0, d"),
        ("np.where(count > 0, rstd, 0.0)", "rstd"),
        ("count / np.where(total == 0, 1, total) * values", "1 / len(values) * values"),
    ),
) + of(
    "_checks",
    (
        "test_segments.py",
        ("if number < 1 or length % number:", "if number < 1:"),
        ("if ends[0] != 0 or ends[-1] != length:", "if ends[-1] != length:"),
        ("if any(end < begin for begin, end in pairwise(ends)):", "if False:"),
        ("if (row != value).any() or", "if"),
        ("if gamma is not None and beta is not None and gamma.shape != beta.shape:", "if False:"),
    ),
)  # fmt: skip

_COUNTS = (
    "test_weights.py::test_segments_in_which_everything_counts "
    "test_weights.py::test_when_everything_counts_the_bits_are_those_of_a_plain_call "
    "test_weights.py::test_weights_whose_sum_is_the_number_of_values "
    "test_weights.py::test_weights_of_any_size "
    "test_weights.py::test_whole_weights_are_repeated_samples "
    "test_weights.py::test_a_channel_in_which_nothing_counts "
    "test_weights.py::test_lengths_are_a_mask "
    "test_weights.py::test_out_must_not_overlap_what_counts"
)
_LATE = (
    "test_weights.py::test_a_channel_in_which_nothing_counts "
    "test_weights.py::test_values_that_begin_to_count_late"
)
_BITS = " ".join(
    f"test_weights.py::test_what_does_not_count_changes_no_bit[{shape}-1-{kind}-float32]"
    for shape in ("(40,3)", "(6,4,70)")
    for kind in ("mask", "weights")
)
WEIGHTS = of(
    "_weights",
    (
        _COUNTS,
        ("self._kind is int and bool(", "bool("),
        ("2.0 ** (np.frexp(most)[1] - 1)", "1.0"),
        ("self._count = count * self.unit\n", "self._count = count\n"),
        ("if self._shared:\n            for i", "if False:\n            for i"),
        ("var = m2 * self.unit /", "var = m2 /"),
        ("(mean, var), momentum, self._count > 0)", "(mean, var), momentum)"),
        ("self.inputs[name] = taken", "pass"),
        ("np.arange(x.shape[along]) < lengths", "np.arange(x.shape[along]) <= lengths"),
        ("if i in (0, along) else 1", "if i == along else 1"),
        ("return self.statistic(counts) / self.unit", "return self.statistic(counts)"),
    ),
) + of(
    "cpu/weighted_rows",
    (
        "test_weights.py::test_a_constant_channel_has_no_spread",
        ("first = value if found == 0 else first",
         "first = 0.0",
         "the sums of a constant channel are then lost and taken again; it only takes longer"),
    ),
    (
        "test_weights.py::test_first_values_far_off_cost_the_later_ones_no_digit",
        ("                if count == 0:  # a shift", "                if False:  # a shift"),
    ),
) + of(
    "cpu/weights",
    (
        _BITS,
        ("(n > r0 and counts(w, n - 1))", "False", "what is fetched decides the time alone"),
    ),
) + of(
    "cpu/weighted_columns",
    (
        _BITS,
        ("            if not counts(w, n):\n                continue\n            args",
         "            args",
         "values of weight 0 add nothing; leaving the row out saves time"),
    ),
    (
        "test_weights.py::test_first_values_may_differ_by_more_than_the_greatest_number",
        ("shift[c] = mean if abs(mean) < np.inf else first", "shift[c] = mean"),
    ),
    (
        "test_weights.py::test_the_first_samples_that_count_give_the_shift",
        ("        if counts(w, r * fold):", "        if True:"),
        ("each(size, element.fill, (K.dtype.type(found + 1), m))", "pass"),
        ("        if found == FIRST:\n            break\n    for c", "    for c"),
    ),
    (
        "test_streaming.py::test_what_counts_streams_the_same_bits",
        ("ahead * alike(w, last, n)", "ahead"),
        ("ahead * alike(w, n, next_)", "ahead", "the next row writes these values again"),
        ("columns_ahead(y, (values, residual, y),", "columns_ahead(y, (values, residual),"),
        ("columns_ahead(out, (dy, values, y, dx, dresidual),",
         "columns_ahead(out, (dy, values, y, dresidual),"),
    ),
) + of(
    "cpu/element",
    (
        _BITS,
        ("d = d if weight != 0 else weight", "d = d"),
        ("d = d if at(w, j) != 0 else like.dtype.type(0)", "d = d"),
        ("v = v if at(w, j) != 0 else other", "v = v"),
        ("store(dx, j, d if counts else zero)", "store(dx, j, d)"),
    ),
    (
        "test_weights.py::test_other_activations[(40,3)-1-silu]",
        ("s[j] += g if at(w, j) != 0 else zero", "s[j] += g"),
        ("store(dresidual, j, g if counts else zero)", "store(dresidual, j, g)"),
    ),
    (
        "test_weights.py::test_whole_weights_are_repeated_samples",
        ("weight * at(h, j)) - weight * normalised", "weight * at(h, j)) - normalised"),
    ),
    (
        "test_weights.py::test_a_mask_of_odd_bytes",
        ("1.0 if at(w, j) != 0 else 0.0", "np.float64(at(w, j))"),
    ),
) + of(
    "moments",
    (
        _COUNTS,
        ("if segments else count) > 0)", "if segments else count) >= 0)"),
    ),
)  # fmt: skip

MIXED = of(
    "_frame",
    (
        "test_mixed.py",
        ('if not (wider and name != "y"):', "if not wider:"),
        (
            "(array.strides == self._fitting and array.itemsize == self.x.itemsize)",
            "array.strides == self._fitting",
            "a packed axis has the itemsize of x as its stride, which no wider array has",
        ),
    ),
) + of("_checks", ("test_mixed.py", ("        and a.itemsize == b.itemsize\n", "")))

FUNCTIONAL = of(
    "functional",
    (
        "test_overlap.py::test_running_statistics_within_x",
        ("_checks.running_to_update(", "(lambda *_: None)("),
    ),
    (
        "test_arithmetic.py::test_running_statistics_forward_are_those_of_update",
        ("mean, m2, call.momentum", "mean, m2, 1 - call.momentum"),
    ),
    (
        "test_arithmetic.py::test_relu_lets_no_gradient_pass_at_0",
        ("dresidual and added", "dresidual"),
        ("if wanted.dx and training:", "if wanted.dx:"),
        ("parameter_gradient(sums[1], call.gamma)", "parameter_gradient(sums[0], call.gamma)"),
        ("parameter_gradient(sums[0], call.gamma,", "parameter_gradient(sums[1], call.gamma,"),
    ),
    (
        "test_errors.py::test_too_few_values_per_channel",
        ("        if alone:\n", "        if not alone:\n"),
    ),
)

CHECKS = of(
    "_checks",
    (
        "test_overlap.py",
        ("i == j or n <= 1 for i, j, n", "True for i, j, n"),
        ("return len(places) < prod(shape)", "return False"),
        (
            "return True  # fewer places than elements",
            "pass",
            "a shortcut: counting the places gives the same answer",
        ),
        ("if step <= inside:", "if step < inside:"),
        ("inside += step * (n - 1)", "inside = step * (n - 1)"),
        ("(abs(step), n) for", "(step, n) for"),
        ("refuse rather than corrupt\n        return True", "\n        return False"),
    ),
    (
        "test_results.py::test_x_as_out_with_another_stride_along_an_axis_of_one",
        ("i == j or n <= 1 for i, j, n", "i == j for i, j, n"),
    ),
    (
        "test_results.py::test_out_that_overlaps_an_input",
        ('["data"][0] == b.__array_interface__["data"][0]', '["data"][0]'),
    ),
    (
        "test_results.py::test_read_only_out",
        ("if not array.flags.writeable:", "if False:"),
    ),
    (
        "test_results.py::test_running_statistics_that_share_memory",
        ("if distinct and written.flags.owndata", "if written.flags.owndata"),
    ),
    (
        "test_errors.py::test_arrays_of_another_dtype_than_x",
        ("if out.dtype != dtype:", "if False:"),
        ("if array.dtype != x.dtype:", "if False:"),
    ),
    (
        "test_errors.py::test_eps_that_is_negative_or_not_finite",
        ("if not 0 <= value < math.inf:", "if not 0 <= value:"),
        ("if not 0 <= value < math.inf:", "if not value < math.inf:"),
    ),
    (
        "test_errors.py::test_too_few_values_per_channel",
        ("if 0 < m <= correction:", "if 0 < m < correction:"),
    ),
    (
        "test_errors.py::test_axis_repeated test_errors.py::test_no_axis_left_to_reduce",
        ("sorted(i % ndim for i in given)", "sorted(given)"),
        ("if len(set(axes)) < len(axes):", "if False:"),
        ("if len(axes) == ndim:", "if False:"),
    ),
    (
        "test_errors.py::test_axis_out_of_range",
        ("-ndim <= i < ndim", "-ndim <= i <= ndim"),
        ("-ndim <= i < ndim", "-ndim - 1 <= i < ndim"),
    ),
    (
        "test_arithmetic.py::test_a_count_of_0_is_for_empty_arrays",
        ("if not (m > 0 or (m == 0 and x.size == 0)):", "if m < 0:"),
        ("if not (m > 0 or (m == 0 and x.size == 0)):", "if m < 1:"),
    ),
)

PLAN = of(
    "cpu/plan",
    (
        "test_plan.py",
        ("* itemsize > last", "* itemsize >= last"),
        ("return chunks, _ceil(items, chunks)", "return chunks, most"),
        ("min(block, C // (2 * threads))", "min(block, C)"),
        ("_ceil(_ceil(C, block), threads) * threads)", "_ceil(C, block))"),
        ("part = min(per, _ceil(rows, least))", "part = per"),
        ("part = min(per, _ceil(rows, least))", "part = rows // least"),
        ("resident and block * itemsize >= PAGE", "resident"),
        ("threads > 1 and N * C * S >= SERIAL_BELOW", "threads > 1"),
        (
            "threads > 1 and N * C * S >= SERIAL_BELOW",
            "N * C * S >= SERIAL_BELOW",
            "one thread gives the same results in smaller blocks",
        ),
        (
            "        if fold == 1:\n",
            "        if True:\n",
            "if samples share a row, all their channels fit into one block",
        ),
        ("elif parallel and fold == 1:", "elif parallel:"),
        ("max(1, min(block, C)), max", "min(block, C), max"),
        ("return max(1, SAMPLE // (C * S))", "return SAMPLE // (C * S)"),
        ("return -(-a // b)", "return a // b"),
    ),
)

CHANNEL = of(
    "cpu/channel",
    (
        "test_digits.py::test_a_mean_of_dy_between_two_floats_is_taken_off_whole",
        ("q[c] = (l - lo * p_c)", "q[c] = (-lo * p_c)"),
    ),
    (
        "test_arithmetic.py::test_beta_takes_what_the_mean_has_beyond_its_float32",
        ("b[c] = beta[c] - lo * a_c", "b[c] = beta[c]"),
        ("(scaled - lo * sum_dy[c])", "scaled"),
        ("q[c] = (l - lo * p_c)", "q[c] = l"),
    ),
    (
        "test_arithmetic.py::test_rstd_of_no_spread_is_0_and_else_follows_ieee",
        ("return 0.0 if spread == 0 else 1 / np.sqrt(spread)", "return 1 / np.sqrt(spread)"),
        ("0.0 if spread == 0", "0.0 if spread <= 1e-300"),
    ),
    (
        "test_arithmetic.py::test_squares_beyond_the_range_of_float32",
        ("not (q <= greatest) or", ""),
    ),
    (
        "test_arithmetic.py::test_squares_among_the_subnormal_numbers_round_a_mean_of_0",
        ("q < n * tiny * 2.0**26 or", ""),
    ),
    (
        "test_digits.py::test_a_shift_taken_from_values_far_off_costs_no_digit",
        ("or n * d * d > m2 / 4", ""),
        ("new_m2, lost(m, mean, q, new_m2, like)", "new_m2, False"),
    ),
    (
        "test_digits.py::test_first_values_far_off_cost_the_later_ones_no_digit",
        ("center - shift + mean", "center - shift * 0 + mean"),
    ),
    (
        _LATE,
        ("d / (m if m > 0 else 1.0)", "d / m"),
    ),
    (
        "test_arithmetic.py::test_moments_of_one_value_and_of_many_merge",
        ("delta + d * (count_b / n)", "delta + d * (count / n)"),
        ("m2 + m2_b + d * d * (count * count_b / n)", "m2 + m2_b"),
    ),
    (
        "test_digits.py::test_first_values_far_off_cost_the_later_ones_no_digit",
        ("(shift_k[c] - shift[c]) + delta_k[c]", "delta_k[c]"),
    ),
    (
        "test_arithmetic.py::test_a_power_of_two_next_to_rstd_is_one",
        ("0x7FF0000000000000", "0x7FFFFFFFFFFFFFFF"),
        ("min(max(floor_power(rstd), tiny), 2.0**126)",
         "max(floor_power(rstd), tiny)"),
        ("max(floor_power(rstd), tiny)", "floor_power(rstd)"),
    ),
    (
        "test_arithmetic.py::test_every_value_of_a_column_is_counted_once",
        ("half = (n + 1) // 2", "half = n // 2"),
    ),
    (
        "test_accuracy.py::test_gradients_that_only_a_large_gamma_brings_back_into_range",
        ("if 0 < p < tiny * u[c]:", "if False:"),
        ("unit = max(least, size * tiny)", "unit = max(1.0, size * tiny)"),
    ),
    (
        "test_accuracy.py::test_a_large_dy_of_one_value_among_the_smallest_stays_finite",
        ("min(tiny * u[c] / p, floor_power(room / size), 1 / tiny)",
         "min(tiny * u[c] / p, 1 / tiny)"),
    ),
    (
        "test_accuracy.py::test_a_mean_of_dy_x_hat_that_is_nearly_0_keeps_v_in_range",
        ("min(tiny * u[c] / p, floor_power(room / size), 1 / tiny)",
         "min(tiny * u[c] / p, floor_power(room / size))"),
    ),
)  # fmt: skip

KEPT = "test_activations.py::test_dy_through_the_activation_is_kept"

ROWS = of(
    "cpu/rows",
    (KEPT, ("after(kept, dy, y, norm)", "after(None, dy, y, norm)")),
    (
        "test_arithmetic.py::test_every_value_of_a_row_is_counted_once",
        ("each(size, element.add_moment_row,", "each(size - 1, element.add_moment_row,"),
        ("each(size, element.add_gradient_row,", "each(size - 1, element.add_gradient_row,"),
        ("((wide[0] + wide[4]) + (wide[2] + wide[6]))", "((wide[0] + wide[4]) + wide[2])"),
    ),
    (
        "test_arithmetic.py::test_squares_beyond_the_range_of_float32",
        ("    if gone:", "    if False:"),
    ),
    (
        "test_digits.py::test_equal_values_after_others_round_with_one_sign",
        ("center = K + d / m", "center = K"),
    ),
    (
        "test_digits.py::test_first_values_far_off_cost_the_later_ones_no_digit",
        ("            shift = near", "            pass"),
        ("    each(LANES, element.fill, (0, lanes))\n", ""),
    ),
    (
        "test_digits.py::test_a_shift_taken_from_values_far_off_costs_no_digit",
        (
            "return others == 0",
            "return False",
            "a dead channel's float64 sums are exact zeros too; they only take longer",
        ),
        ("return others == 0", "return True"),
    ),
)

COLUMNS = of(
    "cpu/columns",
    (
        KEPT,
        ("by_columns(given(kept, u_c), grid, 0)", "None"),
        ("after(kept, dy, y, norm)", "after(None, dy, y, norm)"),
    ),
    (
        "test_digits.py::test_sums_down_the_rows_are_kept_in_float32_for_a_short_run_only",
        ("RUN_ROWS = 32", "RUN_ROWS = 128"),
    ),
    (
        "test_digits.py::test_first_values_far_off_cost_the_later_ones_no_digit",
        ("                    shift[c] = near", "                    pass"),
    ),
    (
        "test_digits.py::test_a_shift_taken_from_values_far_off_costs_no_digit",
        ("center = K + d / m", "center = K"),
    ),
    (
        "test_digits.py::test_equal_values_after_others_round_with_one_sign",
        ("weight * d * d - q_rest)", "weight * d * d)"),
    ),
    (
        "test_arithmetic.py::test_sums_one_after_the_other_carry_their_rounding",
        ("return grown, (grown - so_far) - value", "return grown, 0.0"),
    ),
    (
        "test_arithmetic.py::test_every_value_of_a_column_is_counted_once",
        ("(min(r1, N // fold) - r0) // parts", "(r1 - r0) // parts"),
        ("(s, s64))\n        each(size, element.drain, (q, q64))\n    if", "(q, q64))\n    if"),
        (
            "        each(size, element.drain, (q, q64))\n    if",
            "    if",
            "squares of sum 0 count as lost and are summed again in float64; it only takes longer",
        ),
        ("        each(size, element.drain, (t, t64))\n    if", "    if"),
        ("r1):\n            n, short", "r1 - 1):\n            n, short"),
    ),
    (
        "test_streaming.py",
        ("streamed and c1 - c0 == C and in_sequence(views, C * S)", "streamed and c1 - c0 == C"),
        ("columns_ahead(y, (x, residual, y),", "columns_ahead(y, (residual, y),"),
        ("columns_ahead(y, (x, residual, y),", "columns_ahead(y, (x, y),"),
        ("columns_ahead(y, (x, residual, y),", "columns_ahead(y, (x, residual),"),
        ("out, (dy, x, y, dx, dresidual)", "out, (x, y, dx, dresidual)"),
        ("out, (dy, x, y, dx, dresidual)", "out, (dy, y, dx, dresidual)"),
        ("out, (dy, x, y, dx, dresidual)", "out, (dy, x, dx, dresidual)"),
        ("out, (dy, x, y, dx, dresidual)", "out, (dy, x, y, dresidual)"),
        ("if ahead == 0 or r in (begin, end):", "if ahead == 0 or r == begin:"),
        ("if ahead == 0 or r in (begin, end):", "if ahead == 0 or r == end:"),
        ("min((first - (r - begin) * fold * C * S) % ahead, row_size(grid, r, 0, C))",
         "(first - (r - begin) * fold * C * S) % ahead"),
        ("out[size + j] = out[j]", "out[size + j] = out[0]"),
    ),
    (
        "test_metamorphic.py",
        ("element.apply_rows, pair)\n    for r in range(begin + 2 * half, end)",
         "element.apply_rows, pair)\n    for r in range(begin + 2 * half, end - 1)"),
        ("c0, 0, size)))\n    for r in range(begin + 2 * half, end)",
         "c0, 0, size)))\n    for r in range(begin + 2 * half, end - 1)"),
    ),
    (
        "test_arithmetic.py::test_a_constant_channel_has_no_m2_at_all",
        ("    if same:\n", "    if False:\n",
         "a dead channel's second pass gives exact zeros too; it only takes longer"),
    ),
)  # fmt: skip

ELEMENT = of(
    "cpu/element",
    (KEPT, ("    store(kept[3], j, g3)\n", "")),
    (
        "test_arithmetic.py::test_relu_at_its_edge_forward",
        ("floor if v <= floor else v", "floor if v < floor else v"),
        ("floor if v <= floor else v", "v if v > floor else floor"),
        ("v += load(residual, j)", "v -= load(residual, j)"),
    ),
    (
        "test_arithmetic.py::test_the_mask_is_strict",
        ("return dy if y > 0 else zero", "return dy if y >= 0 else zero"),
        ("return dy if v > threshold else zero", "return dy if v >= threshold else zero"),
    ),
    (
        "test_arithmetic.py::test_every_value_of_a_row_is_counted_once",
        ("(d0 + d1) + (d2 + d3)", "(d0 + d1) + d2"),
        ("(d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)", "(d0 * d0 + d1 * d1) + d2 * d2"),
        ("(g0 + g1) + (g2 + g3)", "(g0 + g1) + g2"),
        ("(t0 + t1) + (t2 + t3)", "(t0 + t1) + t2"),
    ),
    (
        "test_arithmetic.py::test_every_value_of_a_column_is_counted_once",
        ("    wide[j] += sums[j]\n    sums[j] = 0", "    wide[j] += sums[j]"),
    ),
)

STORAGE = of(
    "cpu/storage",
    (
        "test_halves.py::test_rounding_at_between_and_beside_every_pattern",
        (" + ((bits >> 16) & np.int32(1))", ""),
        ("np.int32(0x7FFF)", "np.int32(0x8000)"),
        ("return np.int16((quiet if value != value else rounded) >> 16)",
         "return np.int16(bits >> 16)"),
    ),
    (
        "test_halves.py::test_a_nan_of_any_payload_stays_one_in_bfloat16",
        ("quiet if value != value else rounded", "rounded"),
        ("bits | np.int32(0x400000)", "bits"),
    ),
    (
        "test_halves.py::test_relu_stops_what_is_too_small_to_be_stored",
        ("np.float32(2.0**-25)", "np.float32(0)"),
        ("np.float32(2.0**-134)", "np.float32(2.0**-133)"),
    ),
)  # fmt: skip

MOMENTS = of(
    "moments",
    (
        "test_moments.py test_arithmetic.py::test_an_empty_batch_and_a_full_one_merge",
        ("elif count_b > 0:", "else:"),
        ("d * (count_b / total)", "d * (count / total)"),
        ("d * d * (count * count_b / total)", "d * d"),
        ("np.where(total == 0, 0.0,", "np.where(total < 0, 0.0,"),
        ("rstd if count > 0 else np.zeros_like(rstd)", "rstd"),
        ("m2 / float(count - correction)", "m2 / float(count)"),
        ("        if count > 0:\n            move", "        if True:\n            move"),
        ("[array.copy() for array in running.values()]", "list(running.values())"),
        ("if bool(np.any(count < 0)):", "if False:"),
    ),
    (
        "test_averages.py",
        ("    if not 0 < alpha <= 1:", "    if not 0 <= alpha <= 1:"),
        ("if batches == 0 or alpha == 1:", "if alpha == 1:"),
        ("(batches + 1) * math.log1p(-alpha)", "batches * math.log1p(-alpha)"),
        ("if num_batches_tracked is not None:", "if num_batches_tracked:"),
    ),
)

LAYER = of(
    "layer",
    (
        "test_alone.py",
        ("gamma=ones_like(beta) if gamma is None and beta is not None else gamma", "gamma=gamma"),
        ("gamma is not None, beta is not None, saved.residual", "True, True, saved.residual"),
        ("except (KeyError, TypeError):", "except KeyError:"),
    ),
    (
        "test_averages.py",
        ("elif self.debias and training and self.running_mean is not None:", "elif self.debias:"),
        ("tracked = max(tracked, 1)", "tracked = 1"),
        ("        elif self.momentum is None or self.debias:\n", "        elif self.debias:\n"),
    ),
    (
        "test_renorm.py",
        ("is not None and training and not collecting:", "is not None and training:"),
        ("if renorm is not None and not track_running_stats:", "if False:"),
    ),
)

DISTRIBUTED = of(
    "distributed/_layer",
    (
        "test_thread_comm.py::test_a_deep_copy_of_a_layer_shares_the_communicator",
        ("memo.setdefault(id(self.comm), self.comm)", "pass"),
    ),
    (
        "test_distributed.py",
        ("                Ranks(self.comm).refuse(error)", "                pass"),
        ("if self._synchronised():\n                Ranks", "if True:\n                Ranks"),
        ("if (parts := prepared[-1]) and self._synchronised():", "if parts := ():"),
        ("r_and_d=saved.renorm, out=None", "out=None"),
    ),
) + of(
    "distributed/_functional",
    (
        "test_distributed.py",
        ("gamma_sum(own, *renorm) if renorm else own[1]", "own[1]"),
        ("(with_r_and_d(call, *renorm) if renorm else call).operands()", "call.operands()"),
        ('**dict(zip(("r_max", "d_max"), limits or (), strict=False)),', ""),
    ),
) + of("renorm", ("test_distributed.py", ("    if count == 0:\n", "    if False:\n")))  # fmt: skip

THREAD_COMM = of(
    "distributed/_threads",
    (
        "test_thread_comm.py",
        ("sendbuf.reshape(-1).copy()", "sendbuf.reshape(-1)"),
        ("                self._table = {}\n", ""),
        ("if rank in table:", "if False:"),
        ("self._ended = self._ended or (rank, error)", "self._ended = (rank, error)"),
        ("            if len(table) < self.size:\n", "            if True:\n"),
        ("            self._meeting.end(self.rank, error)", "            pass"),
        ("if (row.size, row.dtype) != (table.shape[1], table.dtype):", "if False:"),
        ("if not limit >= 0:", "if limit < 0:"),
        ("min(limit, threading.TIMEOUT_MAX)", "limit"),
        ("        self.end(rank, error)\n", ""),
    ),
)

MICROBATCH = of(
    "_sweeps",
    (
        "test_microbatch.py",
        ("            del parts\n", ""),
        ("if kind.dtype != expected.dtype:", "if False:"),
        ("if kind.channels != expected.channels:", "if False:"),
        ("if found != form:", "if False:"),
        ("            self._same(self._next(opened), len(self._forms), _NONE)\n", ""),
        (
            'if hasattr(parts, "shape") or not isinstance(parts, Iterable):',
            "if not isinstance(parts, Iterable):",
        ),
        (" and dtype {part.dtype}", ""),
        ('if hasattr(source, "shape"):', "if False:"),
        ("if isinstance(source, Iterator):", "if False:"),
        ("if ended and len(ended) < len(parts):", "if False:"),
    ),
) + of(
    "microbatch",
    (
        "test_microbatch.py",
        ("if total.count != count:", "if False:"),
        ("_checks.whole_count(count, frame.x)", "pass"),
        ('    _checks.enough_values(count, correction, "{} in all parts together", count)\n', ""),
        (
            "running_mean, running_var, moments, momentum=momentum, correction=correction",
            "running_mean, running_var, moments",
        ),
    ),
)

RUNNING = of(
    "_running",
    (
        "test_moments.py",
        ("(1.0 - momentum) * old.astype(np.float64)", "old.astype(np.float64)"),
    ),
)

RENORM = of(
    "renorm",
    (
        "test_renorm.py",
        ("if batch <= self.begin:", "if batch < self.begin:"),
        ('raise ValueError(f"{name} is None; batch', 'return None  # (f"{name} is None; batch'),
        ("    if not bound >= least:", "    if bound < least:"),
        ("r * sums[1]", "sums[1]"),
        (" + d * sums[0]", ""),
        ("gamma_, beta_ = wide * r, wide * d", "gamma_, beta_ = wide * r, d"),
        ("call._replace(gamma=gamma_, beta=beta_)\n\n", "call._replace(gamma=gamma_)\n\n"),
        ("folded.gradients(wanted, True, out_)", "folded.gradients(wanted, False, out_)"),
        (
            '    _checks.enough_values(frame.m, call.correction, "x',
            '    _checks.enough_values(2, 1, "x',
        ),
        ('out_ = frame.out(out, inplace="dy")', "out_ = None"),
    ),
) + of(
    "cpu/channel",
    (
        "test_renorm.py",
        ("1.0 if std == 0 and running_std == 0 else std / running_std", "std / running_std"),
        ("0.0 if off == 0 and running_std == 0 else off / running_std", "off / running_std"),
        ("clipped(ratio, 1 / r_max, r_max)", "clipped(ratio, 0.0, r_max)"),
        ("beta[c] + gamma[c] * d[c]", "beta[c] + d[c]"),
    ),
) + of(
    "cpu/kernels",
    (
        "test_renorm.py::test_one_pass_is_statistics_then_apply_to_the_bit",
        ("            renormalise(norm, m2, grid, eps, _FIRST, grid[1])\n", ""),
        ("        renormalise(norm, m2, grid, eps, c0, c1)\n", ""),
    ),
)  # fmt: skip

INTRINSICS = of(
    "cpu/intrinsics",
    (
        "test_streaming.py::test_kernels_hold_streaming_stores_of_whole_vectors_and_a_fence",
        ('        builder.fence("seq_cst")\n', ""),
        ('                store.set_metadata("nontemporal", hint)\n', ""),
    ),
    (
        "test_streaming.py::test_rows_with_gaps_stream_the_same_bits",
        ("if not isinstance(view, types.NoneType):", "if False:"),
    ),
)

POOL = of(
    "pool",
    (
        "test_pool.py",
        ("        self.shrink(min(max(self._peak, in_use), limit) - in_use)", "        pass"),
        ("if in_use > limit:", "if False:"),
        ("in_use, limit = self._in_use() + size, self.limit", "limit = self.limit; in_use = size"),
        (
            "limit) - in_use)",
            "self.limit) - in_use)",
        ),
        ("_, size = min(heads)", "_, size = max(heads)"),
        ("self._lent[memory.size][id(loan)] = loan", "pass"),
        ("while sizes[-1] < 2 * size:", "while sizes[-1] < size:"),
        ("while sizes[-1] < 2 * size:", "while sizes[-1] < 3 * size:"),
        ("        _pool.shrink(0)", "        pass"),
        ("-(-nbytes // step) * step", "nbytes // step * step"),
        ("loan = self._returned[0]", "loan = self._returned.popleft()"),
        ("if self._lent[size].pop(id(loan), None) is not None:", "if True:"),
        ("start + -start % LINE", "start"),
        ("self.shrink(max(limit - self._in_use(), 0))", "pass"),
    ),
)

DISK = of(
    "cpu/disk",
    (
        "test_cache.py",
        ("if checksum == _checksum(key, content):", "if True:"),
        ("*_VERSIONS, sources.IMPORTED)", "*_VERSIONS)"),
        ("(self._name, str(sig),", "(str(sig),"),
        ("sha256(key + content)", "sha256(content)"),
        ("(sig) or sources.now() != sources.IMPORTED:", "(sig):"),
        (
            "                part.replace(path)",
            "                path.write_bytes(part.read_bytes())",
        ),
        ("        _tidy(path)\n", ""),
        ("age > (_LEFT if found[2] else _UNUSED)", "age > (0 if found[2] else _UNUSED)"),
        ("age > (_LEFT if found[2] else _UNUSED)", "age > (_LEFT if found[2] else 0)"),
        ("age > (_LEFT if found[2] else _UNUSED)", "age > _LEFT"),
        ("found = _FILE.fullmatch(entry.name)", "found = _FILE.match(entry.name)"),
        ("or (found[1] == state and not found[2])", ""),
        ("suppress(OSError), os.scandir(folder) as", "os.scandir(folder) as"),
        ("suppress(OSError), os.scandir(folder.parent) as", "os.scandir(folder.parent) as"),
        ("found is None or found[1] != own[1] or", "found is None or"),
        ("entry.is_dir(follow_symlinks=False) and", "entry.is_dir() and"),
        ("entry.is_dir(follow_symlinks=False) and _remove_unused(entry.path, state)",
         "entry.is_dir(follow_symlinks=False)"),
        ("                _note_use(path)\n", ""),
        ("path.stat().st_mtime > _DAY", "path.stat().st_mtime > _UNUSED"),
    ),
)  # fmt: skip

ARRAYS = of(
    "_arrays",
    (
        "test_interop.py::test_integers_of_objects_whose_dtype_has_another_name_or_none",
        ("return take(obj, name).dtype in _INTEGERS", "return False"),
    ),
    (
        "test_interop.py::test_zeros_without_memory",
        ("if obj._is_zerotensor():", "if False:"),
    ),
    (
        "test_interop.py::test_tangents_of_forward_mode",
        ("forward.unpack_dual(obj).tangent is not None", "False"),
        ("forward.unpack_dual(obj).tangent is not None", "True"),
    ),
    (
        "test_interop.py::test_real_tensors_where_all_others_are_fake",
        ("_TorchDispatchModeKey.FAKE) is not None", "_TorchDispatchModeKey.FAKE) == 0"),
    ),
    (
        "test_interop.py::test_proxies_of_symbolic_tracing",
        ('"torch.fx.proxy.Proxy": (', '"torch.fx.proxy": ('),
    ),
    (
        "integrations/test_autograd.py::test_boxes_given_to_the_function_itself_are_sent_here",
        ('"autograd.tracer.Box": (', '"autograd.tracer": ('),
        ("for base in cls.__mro__)", "for base in (cls,))"),
    ),
    (
        "integrations/test_mygrad.py::test_tensors_given_to_the_function_itself_are_sent_here",
        ('"mygrad.tensor_base.Tensor": (', '"mygrad.tensor_base": ('),
    ),
    (
        "test_interop.py::test_integers_of_other_libraries_are_told_theirs",
        ('in ("astype", "np.float32"), ("float", ""):', 'in (("astype", "np.float32"),):'),
        ('in ("astype", "np.float32"), ("float", ""):', 'in (("float", ""),):'),
        ("if hasattr(obj, method):", "if True:"),
    ),
    (
        "test_interop.py::test_complex_arrays_are_told_to_pass_their_parts",
        ('if "complex" in dtype:', "if False:"),
        (' * ("complex" in dtype)', " * False"),
    ),
)

TABLES = of(
    "_rows",
    (
        "test_rows.py",
        ("head = min(len(x), -self.rows % BLOCK)", "head = 0"),
        ("rest = (len(x) - head) % BLOCK", "rest = len(x) % BLOCK"),
        ("if self.rows == BLOCK:", "if False:"),
        ("self.blocks.copy()", "self.blocks"),
        ("other.origin, other", "_, other"),
        ("counts = np.isfinite(piece)", "counts = ~np.isnan(piece)"),
        ("columns = columns[number == 0]", "columns = columns[:0]"),
        ("counts &= weights[begin : begin + BLOCK] > 0", "pass"),
        ("~np.isfinite(found[1]).all(axis=1)", "(found[1] < -np.inf).all(axis=1)"),
        ("origin[:, None] if relative else", "origin[:, None] if 0 else"),
        ("(part + 1) * size] - origin for part", "(part + 1) * size] - 0 for part"),
        ("(m2 > 0) & (count * mean * mean > FAR**2 * m2)", "m2 < 0"),
        ("if masked else True", "if 0 else True"),
        ("if len(some) == columns == 1:", "if False:"),
        ("[:, : len(parts) - begin]", "[:, :step]"),
    ),
)

SKLEARN = of(
    "integrations/sklearn",
    (
        "integrations/test_sklearn.py::test_inf_is_refused_and_changes_nothing",
        ("return self._seen.copy()", "return self._seen"),
        ("if not np.isfinite(moments.mean).all():", "if False:"),
        ("_refuse_infinite(data)  # which", "# which"),
    ),
    (
        "integrations/test_sklearn.py::test_dense_and_sparse_calls_may_alternate",
        ('self.__dict__.pop("_seen", None)  # it lacks', "# it lacks"),
        ("count * var, 0)", "var, 0)"),
    ),
    (
        "integrations/test_sklearn.py::test_nearly_constant_features_are_theirs",
        ("constant = var <= count * eps * var + (count * mean * eps) ** 2", "constant = var == 0"),
    ),
    (
        "integrations/test_sklearn.py::test_the_same_maps",
        ("mean, 1 / scale, out=None if copy else data)", "mean, 1 / scale)"),
        ("zero, one, out=None if copy else data)", "zero, one)"),
    ),
    (
        "integrations/test_sklearn.py::test_what_cannot_be_written_over_is_copied",
        ("self, reset=False), force_writeable=not copy)", "self, reset=False))"),
    ),
    (
        "integrations/test_sklearn.py::test_what_is_refused",
        ("dtype=data.dtype, ensure_non_negative=True", "dtype=data.dtype"),
        ("if data.shape[1] != self.n_features_in_:", "if False:"),
    ),
    (
        "integrations/test_sklearn.py::test_checks_can_be_turned_off",
        ('if not get_config()["assume_finite"] and not', "if not"),
    ),
    (
        "integrations/test_sklearn.py::test_callbacks_are_called",
        ("callbacks.call_on_fit_task_begin(**task)", "pass"),
        ("callbacks.call_on_fit_task_end(**task, reconstruction_attributes={})", "pass"),
    ),
)

TORCH = [
    *of(
        "integrations/torch/_functional",
        (
            "integrations/test_torch_functional.py::test_symbolic_trace_of_the_function",
            ("if what := stand_in_of(type(input)):", 'if what := "":'),
        ),
    ),
    *of(
        "integrations/torch/_operators",
        (
            "integrations/test_torch_functional.py::test_statistics_whose_sign_is_a_bit_are_not_moved",
            ("resolve=not training),  # a copy", "resolve=True),  # a copy"),
        ),
    ),
    *of(
        "integrations/torch/_tensors",
        (
            "integrations/test_torch_functional.py::test_statistics_whose_sign_is_a_bit_are_not_moved",
            ("except RuntimeError:", "except KeyError:"),
        ),
        (
            "integrations/test_torch_functional.py::test_zeros_without_memory",
            ("except RuntimeError:", "except KeyError:"),
        ),
        (
            "integrations/test_torch_functional.py::test_errors_leave_the_statistics_alone",
            (" or not tensor.is_floating_point()", ""),
        ),
    ),
]

EVERY_FINITE, TWICE, CONSTANT, TOO_LARGE, A_LARGE_GAMMA, DEAD = (
    f"cuda/test_simulator.py::test_simulated[test_{name}]"
    for name in (
        "every_finite_x_is_normalised",
        "x_minus_mean_may_be_twice_the_greatest_number",
        "a_constant_channel_of_large_numbers_gives_beta",
        "a_gamma_that_float32_does_not_hold_leaves_its_own_gradient_right",
        "a_large_gamma_takes_no_dy_out_of_range",
        "columns_of_dead_channels_are_read_in_vectors",
    )
)

ON_GPU = of(
    "cuda/channel",
    (
        EVERY_FINITE,
        ("min(max(least, size + tiny), size - tiny)", "max(least, size + tiny)"),
        ("min(max(least, size + tiny), size - tiny)", "min(least, size - tiny)"),
        ("least, most = 0, unit - 1 - p - tiny", "least, most = 0, NOT_FINITE"),
        ("return is_normal(p) and size <= room", "return size <= room"),
        ("if SUBNORMAL < p < unit + tiny:", "if False:"),
    ),
    (
        TWICE,
        ("exponent_of(hi) < far", "True"),
        ("return -1 if far <= size < NOT_FINITE else -1 - size - tiny", "return -1 - size - tiny"),
    ),
    (
        CONSTANT,
        ("if abs(value) < math.inf:", "if False:"),
        ("NOT_FINITE else -1 - size - tiny", "NOT_FINITE else NOT_FINITE"),
    ),
    (
        TOO_LARGE,
        ("min(unit, most, -tiny)", "min(unit, most)"),
        ("max(unit, rstd_exponent(rstd[c]) - 127)", "unit"),
        (", rstd_exponent(rstd[c]) + 126)", ", 500)"),
    ),
    (
        A_LARGE_GAMMA,
        ("min(unit + tiny - p, room - size)", "unit + tiny - p"),
    ),
    (
        "cuda/test_simulator.py::test_simulated[test_sums_of_dy_may_leave_float32]",
        ("most = min(most, -24)", "pass"),
        ("return is_normal(p) and size <= room", "return is_normal(p)"),
    ),
    (DEAD, ("size < -tiny or size == SUBNORMAL", "size < -tiny")),
) + of(
    "cuda/columns",
    (
        EVERY_FINITE,
        ("keep_one(kept_g, n, w, g)", "pass"),
        ("if not fits:", "if True:"),
        (
            "if not plain:\n                backward_reduce_singly(",
            "if False:\n                backward_reduce_singly(",
        ),
    ),
)

ONE_ODD = "test_shortcut.py::test_one_thing_that_is_not_ordinary"

SHORTCUT = of(
    "_shortcut",
    (
        ONE_ODD,
        ("type(axis) is not int\n        or type(eps) is not float\n        or type(momentum)",
         "type(eps) is not float\n        or type(momentum)"),
        ("or type(momentum) is not float\n", "\n"),
        ("or type(correction) is not int\n", "\n"),
        ("or training is not True\n", "\n"),
        ("or not -_EXACT < correction < _EXACT\n", "\n"),
        ("or type(training) is not bool\n", "\n"),
        ("or (output_mask is not ALL and not _is_mask(output_mask))", ""),
        ("all(type(wanted) is bool for wanted in output_mask)", "True"),
        ("if not want_dx or", "if"),
        ("and len(output_mask) == 4", ""),
    ),
)  # fmt: skip

ORDINARY = of(
    "cpu/ordinary",
    (
        ONE_ODD,
        ("and is_vector(obj, site.C, 8 if dtype == site.float64 else site.itemsize)", ""),
        (" and has_form(obj, form, site.rank)", ""),
        ("is_array(obj, site.ndarray, site.dtype, flags) and has_form",
         "is_array(obj, site.ndarray, site.dtype, 0) and has_form"),
        ("a[1] <= b[0] or b[1] <= a[0]", "a[1] <= b[0]"),
        ("a[1] <= b[0] or b[1] <= a[0]", "b[1] <= a[0]"),
        ("if not (there == at or apart(there, at)):", "if False:"),
        ("shared += not apart(there, bytes_of(tensor, site, size))", "shared += 0"),
        ("shared += not apart(there, bytes_of(vector, site, site.C))", "shared += 0"),
        ("shared = 0 if apart(mean, var) else 1", "shared = 0"),
        ("there = bytes_of(tensor, site, site.N * site.C * site.S)", "there = 0, 0"),
        ("there = bytes_of(vector, site, site.C)", "there = 0, 0"),
        ("flags = WRITABLE if training else ALIGNED", "flags = ALIGNED"),
        ("and given(running_mean, site) == given(running_var, site)", ""),
        ("and (training or given(running_mean, site))", ""),
        ("and parameter(running_var, site, site.dtype, flags)", ""),
        ("and like_or_none(residual, site, form)", ""),
        ("0 <= eps < np.inf", "eps < np.inf"),
        ("0 <= eps < np.inf", "0 <= eps"),
        ("and abs(momentum) < np.inf", ""),
        ("correction < site.N * site.S", "correction <= site.N * site.S"),
        ("and like_x(dy, site, form, ALIGNED)", ""),
        ("and like_or_none(y, site, form)", ""),
        ("and parameter(rstd, site, site.float64, ALIGNED)",
         "and parameter(rstd, site, site.dtype, ALIGNED)"),
        ("if not writable_apart(out, dy, (x, y), (gamma, beta), site, form):",
         "if not writable_apart(out, dy, (y,), (gamma, beta), site, form):"),
        ("return apart(there, (data(mean), data(mean) + 8 * site.C)) and (", "return ("),
    ),
)  # fmt: skip

OBJECTS = of(
    "cpu/objects",
    (
        ONE_ODD,
        ("ALIGNED = np.int64(0x100)", "ALIGNED = np.int64(0)",
         "x86 supports unaligned access; other processors may not"),
        ("WRITABLE = np.int64(0x400) | ALIGNED", "WRITABLE = ALIGNED"),
        ("and word(word(at, _DTYPE), _KIND) & _KIND_BITS == dtype", ""),
        ("word(at, _CLASS) == ndarray", "word(at, _CLASS) != 0"),
        ("if half_word(at, _RANK) != rank:", "if False:"),
        ("others += word(shape, i) != form[i]", "others += 0"),
        ("others += word(strides, i) != form[rank + i]", "others += 0"),
        ("half_word(at, _RANK) == 1\n        and ", ""),
        ("and (size == 1 or word(word(at, _STRIDES), 0) == itemsize)", ""),
    ),
)  # fmt: skip

OVERLOADS = of(
    "cpu/overloads",
    (
        "test_njit.py::test_numbers_that_do_not_fit",
        ("if not 0 <= eps < np.inf:", "if not eps < np.inf:"),
        ("if not 0 <= eps < np.inf:", "if eps < 0:"),
        ("if not np.abs(momentum) < np.inf:", "if False:"),
        ("if not np.abs(correction) < np.inf:", "if False:"),
        ("if training and 0 < m <= correction:", "if training and 0 < m < correction:"),
    ),
    (
        "test_njit.py::test_running_statistics_that_share_memory",
        ("return begin < other + b.nbytes and other < begin + a.nbytes",
         "return begin <= other + b.nbytes and other <= begin + a.nbytes"),
        (" and a.size * b.size > 0", ""),
        ("check_apart(running_mean, running_var, x)", "pass"),
        ("check_apart(running_mean, running_var, gamma)", "pass"),
        ("check_apart(running_mean, running_var, beta)", "pass"),
        ("if overlap(running_mean, running_var):", "if False:"),
        ("if overlap(running_mean, other) or overlap(running_var, other):",
         "if overlap(running_mean, other):"),
    ),
    (
        "test_njit.py::test_parameters_of_another_size",
        ("if wrong_size(gamma, C):", "if False:"),
        ("if wrong_size(beta, C):", "if False:"),
        ("if wrong_size(running_mean, C):", "if False:"),
        ("if wrong_size(running_var, C):", "if False:"),
    ),
    (
        "test_njit.py::test_arrays_of_another_size",
        ("if array.shape != x.shape:", "if array.size != x.size:"),
        ("if wrong_size(mean, C):", "if False:"),
        ("if wrong_size(rstd, C):", "if False:"),
        ("if wrong_size(var_, C):", "if False:"),
        (" or wrong_size(row_of(sum_dy_xhat), C)", ""),
    ),
    (
        "test_njit.py::test_counts_that_are_not_positive",
        ("if count < (1 if x.size > 0 else 0):", "if count < 0:"),
        ("if count < (1 if x.size > 0 else 0):", "if count < 1:"),
    ),
    (
        "test_njit.py::test_updates_that_do_not_fit",
        ("if count < 0:", "if False:"),
        ("if wrong_size(batch_m2, C):", "if False:"),
        ("if wrong_size(mean_, C) or wrong_size(var_, C):", "if wrong_size(mean_, C):"),
        ("check_apart(mean_, var_, batch_m2)", "pass"),
        ("        if count > 0:\n", "        if True:\n"),
    ),
    (
        "test_njit.py::test_refused_when_compiled",
        ('if kind.layout != "C" or not kind.aligned:', "if not kind.aligned:"),
        ("if kind.ndim not in dims:", "if False:"),
        ("if isinstance(kind, types.Optional):", "if False:"),
        ("if kind.dtype != x.dtype:", "if False:"),
        ("if relu and kind is None:", "if False:"),
        ("if missing and known is not True:", "if False:"),
        ("if len(missing) == 1:", "if False:"),
        ('if _literal(inplace) is not True:', "if False:"),
    ),
    (
        "test_njit.py::test_running_statistics_that_are_read_only",
        ("if written and not kind.mutable:", "if False:"),
        ("_where_given(known is not False, **running)", "_where_given(True, **running)"),
    ),
)  # fmt: skip

COMPILING = of(
    "cpu/jit",
    ("test_njit.py::test_fastmath_of_the_caller_changes_nothing", ("    **_OF_THE_CALLER,\n", "")),
)

LAUNCH = of(
    "cpu/launch",
    (
        "test_units.py",
        ("shares = builder.select(alone, INT(1), threads)", "shares = INT(1)"),
        ("step = cgutils.alloca_once_value(builder, INT(1))",
         "step = cgutils.alloca_once_value(builder, INT(0))"),
        ("(builder.sdiv(builder.mul(t, units), shares) for t in (first, last))",
         "(builder.mul(t, builder.sdiv(units, shares)) for t in (first, last))"),
        ("builder.store(INT(1), cgutils.gep_inbounds(builder, memory, 0, 3))", "pass"),
    ),
)  # fmt: skip

HOST = of(
    "cpu/host",
    (
        "test_units.py",
        ('builder.icmp_signed("<", turn, turns)', 'builder.icmp_signed("<=", turn, turns)'),
        ('"add", following, INT(1)', '"add", following, INT(2)'),
    ),
)

THREADS = of(
    "cpu/threads",
    (
        "integrations/test_torch_package.py::test_kernels_run_on_the_threads_that_pytorch_has",
        ("lambda: min(count(), most())", "count"),
    ),
    (
        "integrations/test_torch_package.py::test_other_threading_layers_keep_their_threads",
        ('_host is None or numba.threading_layer() != "omp"', "_host is None"),
    ),
    (
        "integrations/test_torch_package.py::test_a_child_forked_after_pytorch_had_started_its_threads_does_not_hang",
        ("omp = _host is not None", "omp = False"),
    ),
)

ACTIVATIONS = of(
    "activations",
    (
        "test_activations.py",
        ("return one if v > zero else slope", "return one if v >= zero else slope"),
        ("below = zero if u <= zero else v", "below = v"),
        ("if not np.isfinite(number):", "if False:"),
        ("if name not in known:", "if False:"),
    ),
    ("test_from_y.py", ("return y / slope if y <= zero else y", "return y / slope")),
)

FUNCTIONS = of(
    "cpu/functions",
    (
        "test_activations.py",
        ("return zero if a > most else e", "return e"),
        ("a = flat if a > flat else a", "a = a"),
        ("multiply_add(-half, rest, one)", "one"),
    ),
)

INTEGERS = [
    *of(
        "cpu/integers",
        (
            "test_integers.py",
            ("return lambda view: new(0, np.int32)", "return lambda view: new(0, np.int16)"),
            ("squares - d * (d / m)", "squares"),
            ("K * (s + d)", "K * s"),
            ("c0 + (j // S) % (c1 - c0)", "c0 + (j // S)"),
            ("    clear(sums)\n", ""),
        ),
    ),
    *of(
        "_integers",
        (
            "test_integers.py",
            ('if value is not None and name != "fill"', "if False"),
            ("if self.m > MOST:", "if False:"),
            ('self.dtype = result_dtype(dtype, "dtype")', "self.dtype = np.dtype(dtype)"),
        ),
    ),
    *of(
        "cpu/storage",
        (
            "test_integers.py",
            ("np.float32(values[j].integer)", "np.float32(abs(values[j].integer))"),
        ),
    ),
]

POPULATION = [
    *of(
        "_sources",
        (
            "test_population.py",
            ("chunk //= 5", "pass"),
            ("if self.size <= chunk:", "if False:"),
            ("order += self.axes", "grains = {}"),
            ("max(chunk // values // grains[a], 1) * grains[a]", "max(chunk // values, 1)"),
            ("min(stored[a], self.shape[a])", "1"),
            ("len(chunks) != len(self.shape)", "False"),
            ("except NotImplementedError:", "except KeyError:"),
            ("key=lambda a: -abs(strides[a])", "key=lambda a: a"),
            ("isinstance(n, int) and n > 0", "isinstance(n, int)"),
            ("        _check_names(array)\n", ""),
            ("    _check_names(data)\n", ""),
        ),
    ),
    *of(
        "_checkpoint",
        (
            "test_resume.py",
            ("self._ahead == 0 and self._checksum != self._expected_checksum", "False"),
            ("if self._ahead == 0:\n            return False", "return False"),
            ("        if self._ahead:\n", "        if False:\n"),
            ("if self._cost <= SHARE", "if self._cost >= SHARE"),
            ("elif self._state is not self._saved:", "elif False:"),
            ("os.remove(self._path)", "pass"),
            ("absolute = os.path.abspath(os.fsdecode(path))", "absolute = os.fsdecode(path)"),
            ("if not os.path.isdir(folder):", "if False:"),
            ("if os.path.isdir(absolute):", "if False:"),
        ),
    ),
    *of(
        "_files",
        (
            "test_resume.py",
            ("if found != content:", "if found is None:"),
            ("os.remove(beside)", "pass"),
            ("os.path.realpath(file)", "os.fspath(file)"),
            ("*(EOFError, KeyError, RuntimeError, TypeError, ValueError),", ""),
            ("nullcontext(file) if", "open(file) if"),
        ),
    ),
    *of(
        "population",
        (
            "test_population.py",
            ("            del array  # keep only one in memory\n", ""),
            ("self._channels not in (None, source.channels)", "False"),
            ("if not number:", "if False:"),
        ),
        (
            "test_sources.py::test_the_total_may_be_unknown",
            ("return size if size == size else None", "return size"),
        ),
    ),
]

FOLDING = [
    *of(
        "folding",
        (
            "test_folding.py",
            ("side = 2 if norm_first else 1", "side = 1"),
            ("if obstacle and (shift != 0).any():", "if obstacle and shift.all():"),
            ("factor = None if norm_first else scale", "factor = scale"),
            ("    if norm_first and transposed:", "    if False:"),
            ("elif norm_first and padding is None:", "elif False:"),
            ("elif norm_first and padded:", "elif False:"),
            ('dtype, order="C")', "dtype)"),
        ),
    ),
    *of(
        "_kernel_axes",
        (
            "test_folding.py",
            ("max(self.groups, 1)", "self.groups"),
            ("grouped.swapaxes(1, 2) if self.inputs_whole else grouped\n\n", "grouped\n\n"),
            ('"IO" if transposed else "OI"', '"OI"'),
            ('or letters >= set("OM")', ""),
            ("if groups != 1 or transposed:", "if groups != 1:"),
            ("return any(length > 1 for length in kernel)", "return True"),
            ("integer and padding >= 0", "integer"),
            ("for amount in _amounts(each)] or [None]", "for amount in _amounts(each)]"),
            ("padding = padding.tolist()", "pass"),
        ),
    ),
    *of(
        "integrations/torch/_fold",
        (
            "integrations/test_torch_fold.py",
            ("if model.training:", "if False:"),
            ("input.dim() == self.rank,", "True,"),
            ("        if _hooked(m):", "        if False:"),
            ("            inside = tracer.hooked", "            inside = []"),
            ("if count > 1}", "if False}"),
            ('if node.op == "get_attr":', "if False:"),
            ("if any(len(node.args) != 1 or node.kwargs for node in norms):", "if False:"),
            ("if len(others) != 1 or others[0] not in norms:", "if False:"),
            ("if len(others) != 1 or", "if"),
            ("if norm_first and not self.harmless(others[0], call):", "if False:"),
            ("if name is None or", "if name is not None and"),
            ('getattr(module, "inplace", False)', "False"),
            ("return known and not", "return not"),
            ("if name in self.untraced:", "if False:"),
            ("        self.check_traced(found)", "        pass"),
            ("        if self.reads(name):", "        if False:"),
            ("self.read.add(id(attr_val))", "pass"),
            ("if type(root).forward is not nn.Module.forward:", "if True:"),
            ("if tied or self.reads(found):", "if self.reads(found):"),
            ("if tied or self.reads(found):", "if tied:"),
            ("        if _hooked(layer):", "        if False:"),
            ("if norm.training:", "if False:"),
            ("if activation is not True or norm_first:", "if activation is not True:"),
            ('if layer.padding_mode == "zeros" else 0', ""),
            ("if _RANKS[type(layer)] not in _ACCEPTED[type(norm)]:", "if False:"),
            ("if module is norm:", "if module is norm and name != 'again':"),
            ("instead.eval()", "instead"),
        ),
    ),
    *of(
        "integrations/_onnx_fold",
        (
            "integrations/test_onnx_fold.py",
            ("if trains or any(node.output[1:]):", "if trains:"),
            ('if not attributes.get("spatial", 1):', "if False:"),
            ("if self.ir_version < 4:", "if False:"),
            ("if self.often[name] == 1:", "if True:"),
            ("while name in self.often:", "while False:"),
            ("        if scope.uses[value] != 1:", "        if False:"),
            ('if is_a(layer.first, "MatMul"):', "if False:"),
            ("or layer.first.output[0] != first.output[0]", ""),
            ('if attributes_of(first).get("transA", 0):', "if False:"),
            ("weight = weight * attributes", "weight = weight + 0 * attributes"),
            ("bias = bias * attributes", "bias = bias + 0 * attributes"),
            ("if bias.shape[:-1] not in ((), (1,)) or", "if"),
            ("scope.uses[first.output[0]] == 1", "True"),
            ('if a.name in ("alpha", "beta")', "if False"),
        ),
    ),
    *of(
        "integrations/_onnx_graph",
        (
            "integrations/test_onnx_fold.py",
            ("        if name in self.inputs:", "        if False:"),
            ("if users and self.uses[name] == 1 else None", "if users else None"),
            ("if self.ranks.get(name) != 2:", "if False:"),
            ("uses.update(uses_of(inner))", "pass"),
            ("if external_data_helper.uses_external_data(tensor):", "if False:"),
        ),
    ),
]

MUTANTS = [
    *(
        *LAYOUT,
        *FRAME,
        *MIXED,
        *FROM_Y,
        *SEGMENTS,
        *WEIGHTS,
        *FUNCTIONAL,
        *CHECKS,
        *PLAN,
        *CHANNEL,
        *ROWS,
        *COLUMNS,
        *ELEMENT,
    ),
    *(
        *STORAGE,
        *MOMENTS,
        *DISTRIBUTED,
        *THREAD_COMM,
        *MICROBATCH,
        *RUNNING,
        *LAYER,
        *POPULATION,
        *RENORM,
        *INTRINSICS,
        *POOL,
        *DISK,
        *ARRAYS,
        *TABLES,
        *SKLEARN,
        *TORCH,
        *ON_GPU,
    ),
    *(*SHORTCUT, *ORDINARY, *OBJECTS, *OVERLOADS, *COMPILING),
    *(*INTEGERS, *LAUNCH, *HOST, *THREADS, *SECOND_ORDER, *ACTIVATIONS, *FUNCTIONS),
    *FOLDING,
]

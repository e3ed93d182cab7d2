"""The mistakes by the tests that must notice them: a function, what is in it, and what takes its place."""

from tests.mutants.mutant import Mutant

TABLE: dict[str, list[tuple[str, str, str]]] = {
    "tests/analysis/checks/test_condition.py": [
        ("find_spikes", "(1 / stable)", "(stable - 1)"),
    ],
    "tests/analysis/checks/test_strength.py": [
        ("_scale", 'reading.module.scaling.formula == "alpha/r"', 'reading.module.scaling.formula != "alpha/r"'),
        ("find_wrong_scales", "len(hit) == len(exam.readings)", "len(hit) > len(exam.readings)"),
        ("_block_diagonal", "range(module.rank // 2, 1, -1)", "range(module.rank, 1, -1)"),
        ("_block_diagonal", 'module.layout.kind == "merged"', 'module.layout.kind == "conv"'),
        ("_is_block_diagonal", "(used.sum(axis=0) <= 1).all()", "(used.sum(axis=0) == 1).all()"),
        ("_is_block_diagonal", "min(first) >= 0", "max(first) >= 0"),
        ("find_combining_bug", "all(one.module.scaling.alpha", "any(one.module.scaling.alpha"),
        (
            "find_combining_bug",
            "one.module.scaling.alpha == one.module.rank",
            "one.module.scaling.alpha != one.module.rank",
        ),
    ],
    "tests/analysis/test_amplification.py": [
        (
            "Amplification.directions",
            "self.s / np.abs(np.diagonal(self.overlap))",
            "self.s * np.abs(np.diagonal(self.overlap))",
        ),
        ("Amplification.at_rank", "sqrt(self.shape[0] * self.shape[1])", "float(self.shape[0] * self.shape[1])"),
        ("count_far", "abs(row.z) > FAR", "row.z > FAR"),
    ],
    "tests/analysis/test_behaviour.py": [
        ("sum_divergences", "p - q", "p + q"),
    ],
    "tests/analysis/test_equality.py": [
        (
            "_relative",
            "max(product_norm(B1, A1), product_norm(B2, A2))",
            "min(product_norm(B1, A1), product_norm(B2, A2))",
        ),
        ("_relative_dense", "max(norms)", "min(norms)"),
    ],
    "tests/analysis/test_inspection.py": [
        (
            "Inspection.parameters",
            "sum(module.parameters for module in self.modules.values())",
            "max(module.parameters for module in self.modules.values())",
        ),
    ],
    "tests/analysis/test_interference.py": [
        ("_measure", "d_U * d_V", "d_U / d_V"),
        ("far_cosine", "max(FAR, log(max(int(cosines) // 2, 1)))", "min(FAR, log(max(int(cosines) // 2, 1)))"),
    ],
    "tests/analysis/test_intruders.py": [
        ("replace_modules", "max(m.rank for m in members.values())", "min(m.rank for m in members.values())"),
    ],
    "tests/analysis/test_pairwise.py": [
        ("Pairwise._weights", "self.ranks[:, None, :] > 0", "self.ranks[:, None, :] >= 0"),
        ("Pairwise.common", "self.ranks > 0", "self.ranks >= 0"),
        ("_measure.factor_columns", "counts[i] = s.size", "counts[i] = updates[i].rank"),
        ("_measure", "squares / smaller", "squares * smaller"),
    ],
    "tests/analysis/test_similarity.py": [
        ("find_shared_initialisation", "max(one.directions) / one.shape[end]", "max(one.directions) * one.shape[end]"),
        (
            "_nesting",
            "squares / (smaller if count is None else np.minimum(smaller, count))",
            "squares * (smaller if count is None else np.minimum(smaller, count))",
        ),
    ],
    "tests/analysis/test_spectrum.py": [
        ("_group", "norm / adapter_norm", "norm * adapter_norm"),
    ],
    "tests/analysis/test_trajectory.py": [
        ("_length", "set(adapter) - measured.keys()", "set(adapter) & measured.keys()"),
    ],
    "tests/analysis/test_weight_norms.py": [
        ("weight_norms", "sqrt(projection.squares)", "float(projection.squares)"),
    ],
    "tests/arithmetic/test_combine.py": [
        ("total_quality", "b - w", "b + w"),
        ("_same_full_tensors", "content == contents[0]", "content != contents[0]"),
        (
            "combine_extras",
            "all(strength(0, name) == 1 for name in adapter)",
            "any(strength(0, name) == 1 for name in adapter)",
        ),
        (
            "_weighted_difference",
            "any(extra.tensor.shape != first.shape for _, extra in terms)",
            "all(extra.tensor.shape != first.shape for _, extra in terms)",
        ),
        ("check_combinable", 'update.layout.kind == "conv"', 'update.layout.kind != "conv"'),
    ],
    "tests/arithmetic/test_dora.py": [
        (
            "_row_scaling",
            "np.divide(m, lengths, out=np.ones_like(m), where=lengths > 0) - 1",
            "np.divide(m, lengths, out=np.ones_like(m), where=lengths > 0) + 1",
        ),
    ],
    "tests/arithmetic/test_elementwise.py": [
        ("della", "2 * np.arange(n) / (n - 1) - 1", "2 * np.arange(n) / (n - 1) + 1"),
        ("della", "1 - density", "1 + density"),
        ("Product.of", "strength * update.scale", "strength / update.scale"),
        ("_core", "not any(triplet.s.size for triplet in triplets)", "any(triplet.s.size for triplet in triplets)"),
        ("_full", "sum(update.rank for update, _ in updates)", "max(update.rank for update, _ in updates)"),
        (
            "whole_cutoffs",
            "while any(selection.open for selection in selections.values())",
            "while all(selection.open for selection in selections.values())",
        ),
    ],
    "tests/arithmetic/test_methods.py": [
        ("cart", "SHARE * min(joint.shape)", "SHARE * max(joint.shape)"),
        ("_orthonormal", "X.T @ X - np.eye(X.shape[1])", "X.T @ X + np.eye(X.shape[1])"),
        ("model_stock", "lam * t / count * joint.total()", "lam * t / count / joint.total()"),
        ("null_space", "first + other_sum", "first - other_sum"),
        ("slerp", "abs(cosine)", "float(cosine)"),
        ("slerp", "np.vdot(first, second) / norms", "np.vdot(first, second) * norms"),
        ("karcher", "/ w.sum()", "/ w[present].sum()"),
        ("_mean_direction", "np.divide(angles, sines", "np.divide(sines, angles"),
        ("slerp", "a * first + b * second", "a * first - b * second"),
        ("components", "min(joint.shape) // len(joint.cores)", "max(joint.shape) // len(joint.cores)"),
        (
            "compress_then_merge",
            "max(update.rank for update in joint.updates if update is not None)",
            "min(update.rank for update in joint.updates if update is not None)",
        ),
    ],
    "tests/charts/test_pairwise_figure.py": [
        ("conflict_map", "if np.isfinite(cosines).any()", "if not np.isfinite(cosines).any()"),
        ("conflict_map", "np.nanargmin(cosines)", "np.nanargmax(cosines)"),
    ],
    "tests/charts/test_renderers.py": [
        ("_draw_map", '+ 0.5, i + 0.5, "×"', '+ 0.5, i - 0.5, "×"'),
        ("LinePlot.y", "map(log10, (*self.y_limits, value))", "(*self.y_limits, value)"),
    ],
    "tests/charts/test_trajectory_figure.py": [
        ("_charts", "x, phi[0]", "x, phi[1]"),
        ("_chance", '"chance, out": out', '"chance, out": in_'),
        ("_charts", "x, norms", "x, ranks"),
        ("trajectory_charts", "len(known) == len(steps)", "len(known) != len(steps)"),
    ],
    "tests/cli/test_beyond_float64.py": [
        ("_check_mergeable", "abs(module.scale) < SINGLE", "module.scale"),
    ],
    "tests/cli/test_compress.py": [
        ("update_loss", "after.scale / unit", "after.scale * unit"),
    ],
    "tests/cli/test_doctor.py": [
        ("DoctorResult._adapter_lines", "cause[0].adapter == label", "cause[0].adapter != label"),
    ],
    "tests/cli/test_llama_rows.py": [
        ("check_rows", "if turned:", "if not turned and modules.keys() == {None}:"),
    ],
    "tests/cli/test_merge.py": [
        ("FidelitySums.take", "np.count_nonzero(~finite)", "np.count_nonzero(finite)"),
    ],
    "tests/cli/test_similarity.py": [
        ("_kinds", "not similarity.zero", "similarity.zero"),
        ("_angle_column", "angles.tolist())", "angles.tolist()[1:])"),
    ],
    "tests/cli/test_survey.py": [
        (
            "SurveyResult.summary",
            "not (self.adapters or self.unreadable or self.without_pairs)",
            "not (self.adapters and self.unreadable or self.without_pairs)",
        ),
        (
            "SurveyResult.sentences",
            "sum(file.size for file in self.without_pairs)",
            "max(file.size for file in self.without_pairs)",
        ),
    ],
    "tests/cli/test_terminal.py": [
        ("Harmless.write", 'visible(text, keep="\\n\\t")', "text"),
        ("say", "visible(line)", "line"),
    ],
    "tests/cli/test_trajectory.py": [
        ("_loss_columns", "loss.step != row.checkpoint.step", "loss.step == row.checkpoint.step"),
        ("TrajectoryResult.conclusion", "not self.rows[-1].point.frobenius", "self.rows[-1].point.frobenius"),
        (
            "TRAJECTORY_COLUMNS",
            '"point.previous_cosine",\n        "cos previous"',
            '"point.cosine",\n        "cos previous"',
        ),
    ],
    "tests/compression/test_calibrated.py": [
        ("_root", "values[-1:] * len(K) * EPS", "values[-1:] * len(K) / EPS"),
        ("data_error", "trace - visible", "trace + visible"),
        ("whitened_svd", "abs(module.scale) * s[:m]", "abs(module.scale) / s[:m]"),
    ],
    "tests/compression/test_calibration.py": [
        ("_check_carried", 'scale * _peft_factor(layer, "B", name)', 'scale / _peft_factor(layer, "B", name)'),
    ],
    "tests/compression/test_curve.py": [
        ("_choices.measure_new", "max(ranks, default=0)", "min(ranks, default=0)"),
    ],
    "tests/compression/test_informed.py": [
        ("directions_on_data", "out * root", "out / root"),
        ("equalise_units", "frobenius(by_module[name].s) / norm", "frobenius(by_module[name].s) * norm"),
    ],
    "tests/compression/test_magnitudes.py": [
        ("weight_cosines", "W + second(part)", "W - second(part)"),
    ],
    "tests/compression/test_protection.py": [
        ("protection", "max(norms.values(), default=0.0)", "min(norms.values(), default=0.0)"),
    ],
    "tests/conformance/test_conformance.py": [
        ("unpack_merged", "sum(map(len, rows))", "max(map(len, rows))"),
        ("tucker", "core.size // (p * q)", "core.size * (p * q)"),
    ],
    "tests/core/test_attached.py": [
        ("steps", "B * getattr", "B / getattr"),
        ("Attachment._hook", "output + steps_of_pair.outside(z)", "output - steps_of_pair.outside(z)"),
    ],
    "tests/core/test_lazy.py": [
        ("LazyArray.nbytes", "self.size * self.dtype.itemsize", "self.size / self.dtype.itemsize"),
        ("_rows_of_parts.rows", "start - offset", "start + offset"),
    ],
    "tests/core/test_lowrank.py": [
        (
            "LowRank.dense",
            "self.scale * (self.B.astype(np.float64) @ self.A.astype(np.float64))",
            "self.scale / (self.B.astype(np.float64) @ self.A.astype(np.float64))",
        ),
    ],
    "tests/core/test_names.py": [
        ("block", 'joint == "."', 'joint != "."'),
    ],
    "tests/core/test_ranks.py": [
        ("uniform", "np.clip(rank, ", "np.clip(-rank, "),
        ("Rule._rank_of", 'self.name == "error"', 'self.name != "error"'),
        ("Items.per_cost", "gains / np.repeat", "gains * np.repeat"),
        ("shared_ranks", 'module.layout.kind == "experts"', 'module.layout.kind != "experts"'),
    ],
    "tests/core/test_threads.py": [
        ("in_order", "ahead or 2 * count", "ahead or 20 * count"),
    ],
    "tests/core/test_weights.py": [
        ("_as_matrix", "len(shape) == 2", "len(shape) != 2"),
        ("_is_transposed", "stored[0] == stored[1]", "stored[0] != stored[1]"),
        ("weights_of.transposed", 'layout.kind == "linear"', 'layout.kind != "linear"'),
    ],
    "tests/fleet/test_catalogue.py": [
        ("open_to_read", "connection.execute(_UNSOUND).fetchone()", "None"),
        ("_check_header", "page * pages != file.stat().st_size", "False"),
        ("_authorise", "action not in _ALLOWED", "False"),
    ],
    "tests/fleet/test_copies.py": [
        ("short_names", "count[folder] == 1", "count[folder] >= 1"),
    ],
    "tests/fleet/test_hostile_indexes.py": [
        ("open_to_read", "mode=ro&immutable=1", "mode=ro"),
    ],
    "tests/fleet/test_measures.py": [
        (
            "StartSketch._sketch",
            "numbers *= np.concatenate([hashed.signs",
            "numbers *= np.concatenate([abs(hashed.signs)",
        ),
        ("module_keys", "if uses[key] == 1", "if uses[key] >= 1"),
        ("_Reader.finish", "CANCELLING * squares_B * squares_A < energies", "-1 < energies"),
        ("_Reader.finish", "squares_A) > LEAST_SQUARED_NORM", "squares_A) > 0"),
        ("_Reader.checked", "not values[0] <= LARGEST", "False"),
        ("TensorSketch.add_pairs", "(peaks[0] < LEAST_PEAK)", "(peaks[0] == 0)"),
        ("StartSketch._sketch", ", MOST_SHIFT)", ", 2000)"),
        ("_Reader.finish", "SMALL * values[:, 0]", "0 * values[:, 0]"),
    ],
    "tests/fleet/test_tensor_sketch.py": [
        ("TensorSketch.add_pair", "np.multiply(B[:, columns].T, scale,", "np.multiply(B[:, columns].T, 1.0,"),
        ("_sum_of_squares", "rows *= side.signs[:, None]", "rows *= abs(side.signs[:, None])"),
        ("TensorSketch.add_pairs", "peak * hashed.most", "peak / 4096"),
        ("TensorSketch._common_shift", "self._count + count <= COLUMNS", "self._count + count > COLUMNS"),
        ("TensorSketch._common_shift", "self._shift <= shift", "self._shift != shift"),
        ("TensorSketch._round", "convolution = np.rint(", "convolution = np.positive("),
        ("_Reader.read", "[pair.scale for pair in pairs]", "[1.0 for pair in pairs]"),
    ],
    "tests/fleet/test_update.py": [
        ("_stamp", "{_size_and_time(os.stat(config))}", ""),
        ("_chosen_root", "!= real", "== real"),
    ],
    "tests/formats/test_base_digest.py": [
        ("_kept", "{state.st_mtime_ns} {state.st_ctime_ns}", ""),
    ],
    "tests/formats/test_checkpoint_float8.py": [
        ("_scaled", "counts == shape[:1]", "counts != shape[:1]"),
    ],
    "tests/formats/test_comfyui.py": [
        ("scale_tensor", "array.astype(np.float64) * scale", "array.astype(np.float64) / scale"),
    ],
    "tests/formats/test_container.py": [
        ("_Numbers.__call__", "self.start + first * width", "self.start - first * width"),
    ],
    "tests/formats/test_diffusers.py": [
        ("Configs.findings", 'finding.code != "use-dora"', 'finding.code == "use-dora"'),
    ],
    "tests/formats/test_gguf.py": [
        (
            "_findings",
            "any(module_of(tensor, arch, e) for e in (None, 0))",
            "all(module_of(tensor, arch, e) for e in (None, 0))",
        ),
        ("_check_coverage", "size - start", "size + start"),
        ("_is_as_read", "module.scale == 1", "module.scale != 1"),
        ("_fold_scale.fold", "scale * wide", "scale / wide"),
    ],
    "tests/formats/test_gguf_base.py": [
        ("StoredRows.read", "span[positions - first]", "span"),
        ("_order", "return unpermute(np.arange(out), heads_in(rotary(base), heads, out))", "return np.arange(out)"),
        ("_numbers", "np.arange(expert * shape[0]", "np.arange(expert"),
    ],
    "tests/formats/test_gguf_blocks.py": [
        ("BlockLayout.decode", "grouped += offset", "grouped -= offset"),
        ("BlockLayout.unpack", "<< np.uint8(self.low.size)", "<< np.uint8(3)"),
    ],
    "tests/formats/test_gguf_writer.py": [
        ("_same_layout", "begin - end", "0"),
        ("_new_layout", "count + added", "count"),
        ("in_file_order", "order[done:ready] - done", "np.argsort(order[done:ready])"),
    ],
    "tests/formats/test_kohya.py": [
        ("_rescale", 'not finding.code.startswith("alpha-")', 'finding.code.startswith("alpha-")'),
        ("_alpha", "else np.float32(module.rank)", "else np.float32(1)"),
    ],
    "tests/formats/test_loralib.py": [
        (
            "_rescale.rescale",
            "module.scaling.rank or module.rank // module.layout.blocks",
            "module.rank // module.layout.blocks",
        ),
    ],
    "tests/formats/test_mlx.py": [
        ("_config", "m.scale == 1", "m.scale != 1"),
        (
            "_extras",
            "_MAGNITUDES.get(module.layout.kind) != extra.role",
            "_MAGNITUDES.get(module.layout.kind) == extra.role",
        ),
    ],
    "tests/formats/test_model_writer.py": [
        ("write_model", "len(header) + span.begin", "len(header) - span.begin"),
    ],
    "tests/formats/test_peft.py": [
        ("_rescale.rescale", "scale * (1 + twice)", "scale * (1 - twice)"),
        ("_container", 'start[:4] == b"PK\\x03\\x04"', 'start[:4] != b"PK\\x03\\x04"'),
        ("PeftConfig.changed_base", "init == name", "init != name"),
        ("_expert_modules", "slice(e * rank, (e + 1) * rank)", "slice(e * rank, (e - 1) * rank)"),
    ],
    "tests/formats/test_pickle.py": [
        ("_check_step", "arg != 2", "arg == 2"),
        ("check_legacy", "len(set(keys)) != len(keys)", "not keys"),
    ],
    "tests/formats/test_read_together.py": [
        ("read_together", "if not (start - first) % array.dtype.itemsize", "if True"),
        ("read_together", "end - first > MOST_READ", "end - first > 1e9"),
    ],
    "tests/formats/test_relative_name.py": [
        ("is_relative_name", '("", ".", "..")', '("", ".")'),
        (
            "path_to_write",
            "os.path.realpath(path) != str(Path(os.path.realpath(folder)) / name)",
            "not path.parent.is_dir()",
        ),
    ],
    "tests/formats/test_small_dialects.py": [
        ("_sizes", "height - query", "height + query"),
    ],
    "tests/formats/test_xlabs.py": [
        ("_module", "second.shape[1] - width", "second.shape[1] + width"),
    ],
    "tests/linalg/test_largest_entry.py": [
        ("largest_entry_chance", "n == 1", "n != 1"),
    ],
    "tests/linalg/test_measures.py": [
        ("energy_rank", "1 - fraction + 2 * EPS", "1 - fraction - 2 * EPS"),
        ("participation_ratio", "squares.sum() ** 2", "squares.sum() * 2"),
    ],
    "tests/linalg/test_nf4.py": [
        ("quantise_nf4", 'side="left"', 'side="right"'),
    ],
    "tests/linalg/test_product.py": [
        ("_equilibrate", "G / norms", "G * norms"),
    ],
    "tests/linalg/test_projection.py": [
        ("fourth_powers", "size + 1", "size - 1"),
    ],
    "tests/linalg/test_randomized.py": [
        ("_Krylov._outside", "Z - (Z @ Q.T)", "Z + (Z @ Q.T)"),
        ("_iterate", "CLEAR * s", "1e9 * s"),
        ("_Krylov.extend", "STEEP)", "1e9)"),
        ("_Krylov.values", "outside / np", "0 * outside / np"),
    ],
    "tests/linalg/test_rank_update.py": [
        ("RankUpdate.above", "self.Q * (value / (value**2 - s_Q**2))", "self.Q / (value / (value**2 - s_Q**2))"),
        ("_coordinates", "inside + correction", "inside - correction"),
    ],
    "tests/linalg/test_rounding.py": [
        ("_controlled_mean", "control - control.mean()", "control + control.mean()"),
        ("sampled_rounding", "mean_square == 0", "mean_square != 0"),
        ("survivors", "noise * (shape[0] * shape[1]) ** 0.25", "noise / (shape[0] * shape[1]) ** 0.25"),
    ],
    "tests/linalg/test_selection.py": [
        ("Selection._bracket", "n * (1 - p)", "n / (1 - p)"),
    ],
    "tests/linalg/test_sketch.py": [
        ("_subspace", "Z - first @ (first.T @ Z)", "Z + first @ (first.T @ Z)"),
        ("low_rank_approximation", "panel[i : i + step] - Y", "panel[i : i + step] + Y"),
    ],
    "tests/linalg/test_subspace.py": [
        ("unit_energies", "scale_to_unit(s) ** 2", "scale_to_unit(s) * 2"),
        ("phi_map", "G * G", "G / G"),
    ],
    "tests/merging/low_bit/test_record.py": [
        ("GridCodec.uniform", "start * shape[1]", "start"),
        ("GridCodec.added", "factors) - W", "factors)"),
    ],
    "tests/merging/low_bit/test_stochastic.py": [
        ("_inverse", "np.divide(1.0, step", "np.divide(1.0, np.abs(step)"),
    ],
    "tests/merging/test_apply.py": [
        ("MatrixRows.rows", "start - expert * height", "start + expert * height"),
    ],
    "tests/merging/test_attention_live.py": [
        ("_modules", "module.rescaled(2 * module.scale, scaling.doubled())", "module"),
    ],
    "tests/merging/test_extract.py": [
        ("_matrices", "not _is_floating(theirs)", "_is_floating(theirs)"),
        ("may_be_grouped", 'difference.layout.kind == "conv"', 'difference.layout.kind != "conv"'),
        ("ExtractedModule.energy_kept", "1 - self.relative_error**2", "1 + self.relative_error**2"),
        (
            "Extraction.relative_error",
            "sum(module.frobenius**2 for module in self.modules.values())",
            "max(module.frobenius**2 for module in self.modules.values())",
        ),
        ("Extraction.share", "tensor.norm**2", "tensor.norm*2"),
        ("_collect_resized", 'parameter == "weight"', 'parameter != "weight"'),
        ("_is_norm", 'key.rpartition(".")[0] == module', 'key.rpartition(".")[0] != module'),
        ("Triplets.factors", "min(rank, self.count)", "max(rank, self.count)"),
        ("Triplets.spectrum", "self.norm**2 - float(self.s @ self.s)", "0 * self.norm**2 - float(self.s @ self.s)"),
    ],
    "tests/merging/test_feedback.py": [
        ("corrections", "1 + V[j] @ along", "1 - V[j] @ along"),
    ],
    "tests/merging/test_heads.py": [
        ("head_fields", "len(head_keys) != 1", "len(head_keys) == 1"),
    ],
    "tests/merging/test_noise_edge.py": [
        ("sampled_threshold", "1 + sqrt(beta)", "1 + beta"),
    ],
    "tests/merging/test_patch.py": [
        ("PatchReader.block", "_to_ordinals(r[positions]) + units", "_to_ordinals(r[positions]) - units"),
        ("PatchWriter.block", "np.diff(places, prepend=-1) - 1", "np.diff(places, prepend=-1) + 1"),
        (
            "_Entries._decode",
            "self._sum + sums[ends] + self.count + np.arange(ends.size)",
            "self._sum + sums[ends] + self.count - np.arange(ends.size)",
        ),
        ("_encode_gaps", "np.divmod(gaps[wide], 255)", "np.divmod(gaps[wide], 254)"),
    ],
    "tests/merging/test_prediction.py": [
        ("FidelitySums._predict", "norm=norm", "norm=2 * norm"),
    ],
    "tests/merging/test_record.py": [
        (
            "FidelitySums._directions",
            "noise = sqrt(self._lost / max(self._seen, 1))",
            "noise = self._lost / max(self._seen, 1)",
        ),
        ("FidelitySums.fidelity", "self._inside)) / norm", "self._inside)) * norm"),
        ("_mean", "sum(square for _, square in weighted)", "max(square for _, square in weighted)"),
        ("_root_mean", "sqrt(square)", "float(square)"),
    ],
    "tests/merging/test_switchboard.py": [
        (
            "Switchboard.verify",
            "hash_rows([self._base_of(key)]) != digest",
            "hash_rows([self._base_of(key)]) == digest",
        ),
    ],
    "tests/merging/test_update.py": [
        ("KroneckerUpdate.rows", "stop - start", "stop + start"),
        ("update_matrix", "weight * one.scale", "weight / one.scale"),
    ],
    "tests/merging/test_verify.py": [
        ("_Comparison._outcome", "expected and near", "near"),
        ("_Comparison._outcome", "if not LOW <= gain <= HIGH:", "if not LOW <= gain:"),
        (
            "_Comparison.take",
            "bits(M) != bits(block.numbers(block.merged))",
            "bits(M) == bits(block.numbers(block.merged))",
        ),
    ],
    "tests/reporting/test_findings.py": [
        ("_cost", "rounding.gain, rounding.unmoved", "rounding.gain, 1 - rounding.unmoved"),
        ("_notice", "len(texts) - SHOWN", "len(texts) + SHOWN"),
    ],
    "tests/reporting/test_numbers.py": [
        ("subject_tables", "1 - point.uniform.error**2", "1 - point.uniform.error"),
        ("_interactions", "labels[row.first]", "labels[row.second]"),
        ("Collection.closest", "abs(self.cosines[pair])", "self.cosines[pair]"),
        ("ranks_section", "if not without", "if without"),
        ("slider_data", "1 - choice.error**2", "1 - choice.error"),
        ("slider_data", "point.uniform.parameters", "point.rank"),
        ("MERGE_COLUMNS", "max(x.rounding.error for x in row.effects)", "min(x.rounding.error for x in row.effects)"),
        ("advice", "percent(1 - best.uniform.error**2)", "percent(1 - best.uniform.error)"),
        (
            "advice",
            "saved = 1 - best.uniform.bytes / subject.bytes_before",
            "saved = best.uniform.bytes / subject.bytes_before",
        ),
        ("energy_curve", "(spectrum.s / unit) ** 2", "spectrum.s / unit"),
        ("energy_curve", "spectrum.s.size + 1", "spectrum.s.size - 1"),
        ("Subject.shares", "(spectrum.frobenius / self.norm) ** 2", "spectrum.frobenius / self.norm"),
        (
            "_base",
            "median(x.rounding.error for x in effects.values())",
            "max(x.rounding.error for x in effects.values())",
        ),
        ("conflict_map", "{labels[first[k]]} and {labels[second[k]]}", "{labels[second[k]]} and {labels[first[k]]}"),
        (
            "pair_columns",
            'label_column("first", title, lambda pair: labels[pair[0]])',
            'label_column("first", title, lambda pair: labels[pair[1]])',
        ),
        ("_describe_error", "percent(update_error)", "percent(1 - update_error)"),
        (
            "IntruderTotal.of",
            "intruding / energy if energy else 0.0",
            "sum(module.energy_share for module in modules) / max(len(modules), 1)",
        ),
        ("half_energy_modules", "reverse=True", "reverse=False"),
        ("half_energy_modules", "share >= 0.5", "share >= 0.25"),
        ("comparison_section", "len(labels) * (len(labels) - 1) // 2", "len(labels) * (len(labels) - 1) * 2"),
    ],
    "tests/reporting/test_page.py": [
        ("spectra_section", "sum(not spectrum.spectral", "sum(0 < spectrum.spectral"),
    ],
    "tests/tables/test_numbers.py": [
        ("change", "after / before", "after * before"),
    ],
    "tests/tables/test_text.py": [
        ("_fitted", "if not column.sentence", "if True"),
    ],
    "tests/training/test_course.py": [
        ("Course.factor", "1 - cos(pi * remaining)", "1 + cos(pi * remaining)"),
    ],
    "tests/training/test_feed.py": [
        ("Feed._batch", "number - self._next", "number + self._next"),
        ("Feed._batch", "turn * self._world.size", "turn / self._world.size"),
        ("shuffle_order", "number * size", "number / size"),
    ],
    "tests/training/test_injection.py": [
        ("Injection._as_groups", "lr * self.method.ratio", "lr / self.method.ratio"),
    ],
    "tests/training/test_loop.py": [
        ("Loop._divergence_error", "first + many", "first - many"),
        ("Loop._goes_on", "self._waited < patience", "self._waited <= patience"),
        ("loss_and_count", "len(returned) == 2", "len(returned) != 2"),
        ("Loop._keep_best", "value < (inf", "value <= (inf"),
    ],
    "tests/training/test_own_loss.py": [
        ("count_terms", "labels.ndim > 1", "labels.ndim > 2"),
    ],
    "tests/training/test_starts.py": [
        ("gradient_pair", "W.shape[0] ** 0.25", "W.shape[1] ** 0.25"),
        ("row_norms", "alpha=-layer.scale", "alpha=layer.scale"),
    ],
    "tests/training/test_state.py": [
        ("restore_state", "tensors.keys() ^ arrays.keys()", "tensors.keys() & arrays.keys()"),
    ],
    "tests/training/test_tasks.py": [
        ("Task.evaluation.evaluate", "min(loss, LARGEST_LOSS)", "max(loss, LARGEST_LOSS)"),
    ],
    "tests/verbs/grids/test_axes.py": [
        ("_values_of_text", "range(first, last + 1)", "range(first, last)"),
    ],
}
MUTANTS = tuple(Mutant(*one, test) for test, mistakes in TABLE.items() for one in mistakes)

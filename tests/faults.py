"""The faults that are planted: each an edit of one place of the compiler that makes it wrong."""

from __future__ import annotations

from tests.fault import (
    A_CHANGE,
    A_KEY,
    BY_SHAPE,
    EITHER,
    LAID_OUT,
    Fault,
)
from tests.faults_of_banks import BANKS
from tests.faults_of_kernels import KERNELS, SWIGLU
from tests.faults_of_runtime import RUNTIME
from tests.faults_of_training import TRAINING
from tests.faults_of_triton import TRITON

RECOVER = "passes/recover_operators.py"
OP = "runtime/dispatch.cpp"

SPELLINGS = "tests/passes/test_spellings.py"
SOURCES = "tests/runtime/test_sources.py"
NO_IMAGES = "the zoo has no convolutions"

FAULTS: dict[str, Fault] = {
    **TRAINING,
    **RUNTIME,
    # --- What is recovered from the graph -----------------------------------------------------------------------
    "a scale along the tokens taken for one of the rows": Fault(
        "analysis/forms.py",
        "not same_sizes(shape(v), (*(1 for _ in shape(v)[1:]), n))",
        "value(v).numel() != n",
        "tests/passes/test_packed.py::test_a_scale_along_as_many_tokens_as_there_are_rows_is_none",
        unproven="no activation of the zoo has as many tokens as a weight has rows",
    ),
    "a difference of bytes that does not wrap": Fault(
        "analysis/packed.py",
        "and not node.kwargs and not _wraps(node):",
        "and not node.kwargs:",
        "tests/passes/test_packed.py::test_near_misses_are_no_packed_weights_and_right",
        unproven="the zoo takes no bytes from bytes",
    ),
    "scale dropped": Fault(RECOVER, "        return scale.number\n", "        return 1.0\n", SPELLINGS),
    "sign turned": Fault(RECOVER, "        return scale.number\n", "        return -scale.number\n", SPELLINGS),
    "bias lost": Fault(RECOVER, "    terms += [Bias(bias)] if bias is not None else []\n", "", SPELLINGS),
    "last adapter lost": Fault(
        RECOVER, "in sorted(adapters, key=low_rank", "in sorted(adapters[:-1] or adapters, key=low_rank", SPELLINGS
    ),
    "rows not scaled": Fault(
        RECOVER,
        "(RowScale(rowscale),) if rowscale is not None else ()",
        "()",
        "tests/passes/test_hoist_weights.py",
    ),
    "alpha of an add overlooked": Fault(
        "analysis/matrices.py",
        "    return float(alpha) if is_call(node, aten.add.Tensor) else -float(alpha)\n",
        "    return 1.0 if is_call(node, aten.add.Tensor) else -1.0\n",
        SPELLINGS,
    ),
    "activations taken to be one": Fault(
        "analysis/forms.py",
        "    return source_of(a.activation) is source_of(b.activation) and "
        "(a.turned, a.layout) == (b.turned, b.layout)\n",
        "    return True\n",
        "tests/passes/test_recover_operators.py",
    ),
    "Kronecker's factors swapped": Fault(
        "analysis/layouts.py",
        "return (found[0], found[1]) if fits",
        "return (found[1], found[0]) if fits",
        "tests/passes/test_fuse_kronecker.py",
    ),
    "added to an opaque base where it is taken away": Fault(
        "passes/opaque_bases.py",
        "            form = form if weight == 1.0 else form.scaled(weight, node)\n",
        "",
        "tests/passes/test_opaque_bases.py",
    ),
    "ranks of blocks not dealt out": Fault(
        "passes/merge_blocks.py",
        "    if order == sorted(order):\n        return matrix\n",
        "    return matrix\n",
        "tests/passes/test_merge_blocks.py",
    ),
    "a convolution's scale lost": Fault(
        "passes/unfold_convolutions.py",
        "{product: self.of(args(product)[0])}), None, node)",
        "{product: self.of(args(product)[0])}) and self.of(args(product)[0]), None, node)",
        "tests/passes/test_unfold_convolutions.py",
        unproven=NO_IMAGES,
    ),
    "a padded convolution taken for a projection": Fault(
        "passes/unfold_convolutions.py",
        "set(stride) == {1} and set(padding) == {0}",
        "set(stride) == {1}",
        "tests/passes/test_unfold_convolutions.py",
        unproven=NO_IMAGES,
    ),
    "half of a stream's sum lost": Fault(
        "passes/split_streams.py",
        "aten.add.Tensor, tuple(pair), one",
        "aten.add.Tensor, (pair[0], pair[0]), one",
        "tests/passes/test_split_streams.py",
    ),
    # --- What it is made into -----------------------------------------------------------------------------------
    "siblings swapped": Fault(
        "passes/group_siblings.py",
        "zip(members, items, strict=True)",
        "zip(members, items[:-2] + items[-2:][::-1], strict=True)",
        "tests/passes/test_group_siblings.py",
    ),
    "first adapter's factors for all": Fault(
        "ir/sums.py",
        "for _, _, leaf in leaves(term)]",
        "for _, _, leaf in leaves(self.lowrank[0] if isinstance(term, LowRank) else term)]",
        "tests/passes/test_fuse_zflora.py",
    ),
    "adapters lost by a fused group": Fault(
        "passes/fuse_zflora.py",
        "(x, sums, False, None)",
        "(x, tuple(s._replace(terms=s.terms[:1]) if s.dense else s for s in sums), False, None)",
        "tests/passes/test_fuse_zflora.py",
    ),
    "Kronecker's scale dropped": Fault(
        RECOVER,
        "Kronecker(tuple(modes), scale)",
        "Kronecker(tuple(modes))",
        "tests/passes/test_fuse_kronecker.py",
    ),
    "residual lost where it is taken": Fault(
        "passes/fuse_epilogues.py",
        "sums[index].plus(Residual(residual))",
        "sums[index]",
        "tests/passes/test_fuse_epilogues.py",
    ),
    "gate and up swapped": Fault(
        "passes/fuse_epilogues.py",
        "(sums[first], sums[1 - first])",
        "(sums[1 - first], sums[first])",
        "tests/passes/test_fuse_epilogues.py",
    ),
    "bias lost by a linear left over": Fault(
        "ir/sums.py",
        "    return F.linear(x, weight, bias)\n",
        "    return F.linear(x, weight)\n",
        "tests/passes/test_canonicalize.py",
    ),
    "a transposed weight's mark lost in print": Fault(
        "ir/operators.py",
        "{'wt' if self.transposed else 'w'}=",
        "w=",
        "tests/codegen/test_spec.py",
        unproven=BY_SHAPE,
    ),
    "hoisted from its sources in another order": Fault(
        "passes/hoist_weights.py",
        "tuple(taken.index(source) for source in sources)",
        "tuple(sorted(taken.index(source) for source in sources))",
        "tests/passes/test_hoist_weights.py",
    ),
    # --- The op -------------------------------------------------------------------------------------------------
    "operands kept from the first call": Fault(
        OP,
        "      in[i] = operand->const_data_ptr();\n",
        "      static std::unordered_map<std::string, const void*> kept;\n"
        "      const void*& first = kept[text + program.operands[i].name];\n"
        "      in[i] = first = first ? first : operand->const_data_ptr();\n",
        "tests/runtime/test_ops.py",
    ),
    "a hoisted value outlives a write that the op sums up": Fault(
        "runtime/hoisted.cpp",
        "    if (then.numbers != now.numbers && ",
        "    if (false && ",
        f"{SOURCES}::test_every_number_of_every_source_counts",
        unproven=A_CHANGE,
    ),
    "a hoisted value outlives a write that gemv sums up": Fault(
        "runtime/hoisted.cpp",
        "if (sum >= 0 && sums[sum] != values[at]->states[i].numbers) return false;",
        "if (sum > 64) return false;",
        f"{SOURCES}::test_every_number_of_every_source_counts",
        unproven=A_CHANGE,
    ),
    "a checksum of the last numbers alone": Fault(
        "codegen/checksum.cpp",
        "const Longs longs = (Longs)state;",
        "const Longs longs = {};",
        f"{SOURCES}::test_a_checksum_sees_signs_order_and_place",
        unproven=A_CHANGE,
    ),
    "a plan's last m is the next one's": Fault(
        OP,
        "return m <= row.most; })->plan;",
        "return m < row.most; })->plan;",
        "tests/runtime/test_ops.py::test_each_plan_runs_up_to_its_last_m",
        unproven=EITHER,
    ),
    "gate and up swapped where the library multiplies": Fault(
        OP,
        "Tensor y = view(out[i], m,",
        "Tensor y = view(out[program.swiglu ? 1 - i : i], m,",
        SWIGLU,
        library=True,
    ),
    "strides of x overlooked": Fault(
        OP,
        "  if (!x.is_contiguous()) x = x.contiguous();\n",
        "",
        "tests/runtime/test_ops.py::test_strided_inputs_are_read_right",
        unproven=LAID_OUT,
    ),
    "operands of any shape taken": Fault(
        OP,
        "    if (o.shape[d] != -2 && t.size(d) != o.shape[d]) return false;\n",
        "    if (t.size(d) < 0) return false;\n",
        "tests/runtime/test_ops.py::test_an_operand_that_no_longer_fits_is_named",
        unproven=A_CHANGE,
    ),
    # --- Plans, guards, caches ----------------------------------------------------------------------------------
    "wrong crossover": Fault(
        "planning/cost.py",
        "rows.append((here, inside))",
        "rows.append((here, outside))",
        "tests/planning/test_cost.py",
        unproven=EITHER,
    ),
    "the library is given what it cannot write": Fault(
        "ir/spec.py",
        "self.x == kind == out for kind, out",
        "self.x == kind for kind, out",
        "tests/planning/test_cost.py",
        unproven="it is an error of torch's matmul, and no value",
    ),
    "requires_grad goes unseen": Fault(
        "runtime/unchanged.cpp",
        " || t->requires_grad() != one.gradient",
        "",
        "tests/watch/test_unchanged.py",
        unproven=A_CHANGE,
    ),
    "a tensor's change of dtype goes unseen": Fault(
        "runtime/unchanged.cpp",
        "sizeof *t - watch.from) != 0) return false;",
        "0) != 0) return false;",
        "tests/test_guarantees.py -k head",
        unproven=A_CHANGE,
    ),
    "a weight that is tied no more goes unseen": Fault(
        "watch/guards.py",
        "use_lamba_guard_for_object_aliasing=False",
        "use_lamba_guard_for_object_aliasing=True",
        "tests/watch/test_unchanged.py -k tied",
        unproven=A_CHANGE,
    ),
    "guards that a filter wants are not made": Fault(
        "watch/guards.py",
        "                inner(builder, copy, **keywords)\n            elif",
        "                pass\n            elif",
        "tests/watch/test_unchanged.py -k filter",
        unproven=A_CHANGE,
    ),
    "a module's change goes unseen": Fault(
        "runtime/unchanged.cpp",
        "    if (*watch.words[i].first != watch.words[i].second) return false;\n",
        "",
        "tests/watch/test_unchanged.py",
        unproven=A_CHANGE,
    ),
    "a list's change goes unseen": Fault(
        "runtime/unchanged.cpp",
        "return one.list->size == one.size && std::equal(was, was + one.size, one.list->items);",
        "return one.list->size == one.size;",
        "tests/watch/test_unchanged.py",
        unproven=A_CHANGE,
    ),
    "a list grows unseen": Fault(
        "runtime/unchanged.cpp",
        "return one.list->size == one.size && std::equal(",
        "return std::equal(",
        "tests/watch",
        unproven=A_CHANGE,
    ),
    "checksum of an entry ignored": Fault(
        "cache.py",
        "    if hashlib.sha256(raw).hexdigest() != expected:\n",
        "    if not expected:\n",
        "tests/test_fallback.py",
        unproven="a proof runs what was built just now",
    ),
    "key that misses an option": Fault(
        "options.py",
        'dataclasses.replace(self, dump="", huge_pages=True, executor=True, watch=True, bind=True)',
        'dataclasses.replace(self, dump="", huge_pages=True, executor=True, watch=True, bind=True, disable=())',
        "tests/test_keys.py",
        unproven=A_KEY,
    ),
    "key that misses Inductor's options": Fault(
        "backend.py", "str(sorted(inductor.items(), key=str))", '""', "tests/test_keys.py", unproven=A_KEY
    ),
    "key that misses the compiler": Fault(
        "backend.py",
        "(_torch_version(), _triton_version(), compiler)",
        "(_torch_version(), _triton_version())",
        "tests/test_keys.py",
        unproven=A_KEY,
    ),
    "a library's key misses the compiler": Fault(
        "codegen/build.py",
        "cache.digest(source, fingerprint())",
        "cache.digest(source)",
        "tests/test_keys.py",
        unproven=A_KEY,
    ),
    "key that misses the C++": Fault(
        "cache.py",
        'path.suffix in (".py", ".cpp")',
        'path.suffix in (".py",)',
        "tests/test_keys.py",
        unproven=A_KEY,
    ),
    **KERNELS,
    **BANKS,
    **TRITON,
}

"""What launches can reach, and what of it a list of variants proves.

Each thing is a line of text: a row of the tables, how a kernel is cut by it, and what else decides
how many registers it needs: each phase, splits, softcap and none. Where few registers are left,
that is each phase with softcap and without. A negative scale computes scores as softcap does, with
less. In float32 the compiler spills for no reason that these tell: there it is also headdims other
than the row's, not equal, with a negative scale.
"""

import itertools

from ringkern.kernels import configs, cut, decode, step

HEADDIMS = (16, 64, 80, 96, 128, 192, 256)
HEADS = ((64, 8), (8, 8), (40, 8), (71, 1))
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096)
DTYPES = {"*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32"}


def reachable(arch):
    """Return all that kernels are launched with, each line once."""
    found = []
    for dtype, d in itertools.product(configs.DTYPES, HEADDIMS):
        for phase, heads, tokens in itertools.product(configs.PHASES, HEADS, TOKENS):
            how = cut.choose_cut(*heads, d, d, dtype, arch, tokens, phase)
            row = configs.find("step", arch, d, d, dtype, phase, how.block_m)
            size = *how[:2], *how[3:]
            for softcap, split in itertools.product((False, True), repeat=2):
                found += _step(row, size, phase, softcap, split)
            found += _narrow(row, size)
            if how.group > 1:
                found += _packed(row, size, phase)
        for rows, softcap in itertools.product((1, 16, 17, 1024), (False, True)):
            blocks, config = decode._blocks(arch, d, d, dtype, rows)
            size = blocks["BLOCK_M"], *config[1:]
            found.append(_decode(configs.find("decode", arch, d, d, dtype), size, softcap))
        found.append(str(configs.find("merge", arch, d, d, dtype)))
    return list(dict.fromkeys([*found, str(configs.find("pack", arch, 1, 1, "float32"))]))


def proven(arch, variants):
    """Return what of reachable() these variants are."""
    found = set()
    for variant in variants:
        values, types = variant.constexprs, variant.signature
        launch = variant.num_warps, variant.num_stages, variant.maxnreg
        kernel = variant.fn.__name__
        if kernel in ("_step", "_decode"):
            shape = arch, values["HEADDIM"], values["HEADDIM_V"], DTYPES[types["q"]]
            size = values["BLOCK_M"], values["BLOCK_N"], *launch
        if kernel == "_step":
            for phase in configs.PHASES if values["SPLIT"] else ():
                row = configs.find("step", *shape, phase, values["BLOCK_M"])
                found.update(_step(row, size, phase, values["SOFTCAP"], True))
            for phase in _phases(values["SEED"], types["q"], types["result"], values["SPLIT"]):
                row = configs.find("step", *shape, phase, values["BLOCK_M"])
                found.update(_step(row, size, phase, values["SOFTCAP"], False))
                found.update(_packed(row, size, phase) if values["PACKED"] else ())
                narrow = values["NEGATIVE"] and len({row.headdim, *shape[1:3]}) == 3
                found.update(_narrow(row, size) if narrow else ())
        elif kernel == "_decode":
            found.add(_decode(configs.find("decode", *shape), size, values["SOFTCAP"]))
        elif kernel == "_merge":
            d, dtype = values["HEADDIM"], DTYPES[types["outs"]]
            found.add(str(configs.find("merge", arch, d, d, dtype)))
        elif kernel == "_copy_rows":
            found.add(str(configs.find("pack", arch, 1, 1, "float32")))
    return found


def _phases(seed, dtype, result, split):
    """Return the phases whose kernel starts from this seed and writes a result of this type.

    One whose keys are split writes float32 in any phase, and reads a state in "last" alone. It
    needs all registers that it needs otherwise, so that it stands for both.
    """
    if split and dtype != "*fp32":
        return ("last",) if seed == "state" else ("first",)
    both = ("middle", "last") if seed == "state" else ("first", "only")
    if dtype == "*fp32":
        return both
    return both[result != "*fp32" :][:1]


def _step(row, size, phase, softcap, split):
    """Return the lines of a step. size: block_m, block_n, warps, stages, registers."""
    tile = f"{row} as {size}"
    lines = [f"{tile} split"] if split else [f"{tile} phase {phase}"]
    if _tight(row, size):
        return lines if split else [f"{lines[0]} softcap {softcap}"]
    return lines if split else [*lines, f"{tile} softcap {softcap}"]


def _packed(row, size, phase):
    return [f"{row} as {size} phase {phase} packed"] if _tight(row, size) else []


def _narrow(row, size):
    return [f"{row} as {size} narrower"] if row.bits == 32 else []


def _tight(row, size):
    block_m, block_n, num_warps, *_ = size
    values = block_m * (block_n + row.headdim) // (32 * num_warps)
    return row.bits == 16 and values >= step.MANY_VALUES


def _decode(row, size, softcap):
    return f"{row} as {size} softcap {softcap}"

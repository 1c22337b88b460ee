"""Compiles kernels for a GPU that need not be there, and reads the machine code.

A child of compile_report.py, which sets its environment, since some compiler failures abort the
process. Reads jobs from stdin, one line of JSON each, and answers each with one line:
{"list": modules, "archs"} with what there is to compile; {"module", "variant", "arch"} with FACTS.
An exception is answered with {"error"}.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# What is read of the machine code. The report's columns, in order.
FACTS = {
    "num_warps": "as compiled",
    "num_stages": "as asked for",
    "registers": "per thread",
    "spill_bytes": "stored and loaded per thread because registers ran out",
    "local": "instructions that touch local memory: spills, stack, indexed arrays",
    "shared_bytes": "per block",
    "wgmma": "warpgroup matrix instructions of sm_90",
    "mma_sync": "warp matrix instructions",
    "tcgen05": "matrix instructions of sm_100",
    "cp_async": "asynchronous copies into shared memory",
    "tma": "bulk tensor copies",
    "loop": "instructions of the loop over blocks: per block, all warps the same",
    "masked_loop": "the same of the longest such loop, the one under a mask where there are two",
    "unpipelined": "loops over blocks without an asynchronous copy",
    "serialized": "ptxas put a wait behind every wgmma",
}
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "mma_sync": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma\.",
    "cp_async": r"cp\.async\.c[ag]\.shared",
    "tma": r"cp\.async\.bulk\.tensor",
}
# The same in SASS, by the first part of a name.
TENSOR_CORES = {"HGMMA", "HMMA", "UTCHMMA"}
COPIES = {"LDGSTS", "UTMALDG"}


def listing(modules, archs):
    """Return triton's version, the jobs, and what launches can reach and no variant proves."""
    import triton

    from tests import compile_reach

    jobs, unproven = [], []
    for arch in archs:
        found = {module: importlib.import_module(module).variants(arch) for module in modules}
        for module, variant in ((m, v) for m in modules for v in found[m]):
            job = {"module": module, "variant": variant.name, "arch": arch}
            jobs.append(job | {"expects": sorted(variant.expects)})
        known = compile_reach.proven(arch, [v for some in found.values() for v in some])
        reached = compile_reach.reachable(arch)
        unproven += [f"sm_{arch} {what}" for what in reached if what not in known]
    return {"triton": triton.__version__, "jobs": jobs, "unproven": unproven}


def source_of(variant):
    from triton.compiler import ASTSource

    names = variant.fn.arg_names
    signature = {name: variant.signature[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    divisible = [["tt.divisibility", 16]]
    attrs = {(names.index(name),): divisible for name in variant.divisible_by_16}
    return ASTSource(variant.fn, signature, constexprs=constexprs, attrs=attrs)


def compile_variant(variant, arch, cache=None):
    """Return the facts of one variant. cache: a folder for answers, by all that decides them."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(variant)
    options = {name: getattr(variant, name) for name in ("num_warps", "num_stages", "maxnreg")}
    parts = (triton.__version__, arch, options, source.hash(), pathlib.Path(__file__).read_text())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    known = cache and pathlib.Path(cache, f"{key}.json")
    if known and known.exists():
        return json.loads(known.read_text())
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, GPUTarget("cuda", arch, 32), options=options)
    facts = facts_of(kernel.asm["ptx"], sass_of(kernel.asm["cubin"]), log.getvalue())
    facts |= {"num_warps": kernel.metadata.num_warps, "num_stages": variant.num_stages}
    facts |= {"shared_bytes": kernel.metadata.shared}
    facts = {name: facts[name] for name in FACTS}
    if known:
        known.parent.mkdir(parents=True, exist_ok=True)
        part = known.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(facts))
        part.replace(known)
    return facts


def sass_of(cubin):
    """Return the disassembly by the nvdisasm of triton's wheel."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "-c", file.name], check=True, capture_output=True
        ).stdout.decode()


def facts_of(ptx, sass, log):
    """Return what PTX, SASS and ptxas' log say; the log must be one of ptxas -v."""
    registers = re.search(r"Used (\d+) registers", log)
    if not registers:
        raise RuntimeError(f"no register count in ptxas' log: {log or 'empty'}")
    facts = {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}
    code = instructions(sass)
    names = [name for name, _, _ in code]
    loops = block_loops(code)
    sizes = [end - start for start, end in loops]
    return facts | {
        "registers": int(registers[1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "local": sum(name.startswith(("LDL", "STL")) for name in names),
        "loop": min(sizes, default=0),
        "masked_loop": max(sizes, default=0),
        "unpipelined": sum(not count(code[slice(*loop)], COPIES) for loop in loops),
        "serialized": len(re.findall(r"wgmma.*serializ", log)),
    }


def instructions(sass):
    """Return (name with modifiers, label of the address, label that it jumps to) by instruction."""
    code, labels = [], set()
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels.add(label[1])
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L_\w+)\)", found[2])
            code.append((found[1], frozenset(labels), target[1] if target else None))
            labels = set()
    return code


def count(code, heads):
    """Return how many of the instructions have a name that begins with one of these parts."""
    return sum(name.partition(".")[0] in heads for name, _, _ in code)


def block_loops(code):
    """Return [start, end) of each loop over blocks: where the multiplications are.

    On tensor cores, else in float32. Loops that only wait do not multiply, a loop around others is
    not over blocks, and one with less than half the work of the busiest is something else.
    """
    place = {label: i for i, (_, labels, _) in enumerate(code) for label in labels}
    loops = {
        (place[target], i + 1)
        for i, (name, _, target) in enumerate(code)
        if name.startswith("BRA") and place.get(target, i) < i  # at the end it jumps to itself
    }
    heads = TENSOR_CORES if count(code, TENSOR_CORES) else {"FFMA"}
    work = {loop: count(code[slice(*loop)], heads) for loop in loops}
    busy = [loop for loop in loops if 2 * work[loop] >= max(*work.values(), 2)]
    return sorted(
        a for a in busy if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in busy)
    )


def answer(job, cache):
    if "list" in job:
        return listing(job["list"], job["archs"])
    module = importlib.import_module(job["module"])
    variants = {variant.name: variant for variant in module.variants(job["arch"])}
    return compile_variant(variants[job["variant"]], job["arch"], cache)


def main(cache=None):
    # What triton and ptxas print must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), cache)
        except Exception as error:  # any failure of the compiler is the job's answer
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

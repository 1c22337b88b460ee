"""One kernel with one configuration, as offline compilation takes it: no tensor, no GPU.

Every kernel module has variants(arch), a list of these; tests/compile_worker.py compiles them.
"""

from dataclasses import dataclass

from ringkern.kernels.target import triton

# What a variant may expect of its machine code.
EXPECTATIONS = {
    "wgmma": "sm_90's warpgroup matrix instructions",
    "mma": "tensor cores in any form: mma.sync, wgmma or tcgen05",
    "pipelined": "loads of coming blocks under the work on this one: cp.async or TMA",
}


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its arguments, and what the compiler must make of it."""

    name: str  # unique in its module and the same for every arch, as "bf16-d128-first-causal"
    fn: triton.JITFunction
    signature: dict[str, str]  # argument -> "*bf16", "i32", "i64", "fp32" or "constexpr"
    constexprs: dict[str, object]  # the value of each argument of type "constexpr"
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers that a thread may have
    divisible_by_16: tuple[str, ...] = ()  # pointers and strides that are, as at run time
    expects: frozenset[str] = frozenset()  # of EXPECTATIONS

    def __post_init__(self):
        names = list(self.fn.arg_names)
        constexprs = {name for name, kind in self.signature.items() if kind == "constexpr"}
        faults = {
            "signature, not an argument": self.signature.keys() - set(names),
            "argument, not in signature": set(names) - self.signature.keys(),
            "constexpr without value": constexprs - self.constexprs.keys(),
            "value, not a constexpr": self.constexprs.keys() - constexprs,
            "divisible_by_16, not a run-time argument": set(self.divisible_by_16)
            - (self.signature.keys() - constexprs),
            "unknown expectation": self.expects - EXPECTATIONS.keys(),
        }
        found = [f"{fault}: {sorted(which)}" for fault, which in faults.items() if which]
        if found:
            raise ValueError(f"variant {self.name} of {self.fn.__name__}: {'; '.join(found)}")

"""How a step is cut: as many rows as there is use for, and heads together where that fills them."""

import itertools

import accelerator  # noqa: F401, which skips where there is no triton
from ringkern.kernels import configs
from ringkern.kernels.cut import choose_cut

ARCHS = (80, 86, 90, 100)
HEADS = ((64, 8), (8, 8), (40, 8), (71, 1))


def test_a_run_of_few_queries_is_one_tile_of_few_rows():
    dims, tokens = (64, 128, 256), (1, 2, 3, 8, 17, 64, 127)
    for arch, dtype, d, heads, n in itertools.product(ARCHS, configs.DTYPES, dims, HEADS, tokens):
        full = configs.pick("step", arch, d, d, dtype, "only")
        cut = choose_cut(*heads, d, d, dtype, arch, n, "only")
        name = f"sm_{arch} {dtype} {d} {heads} {n}: {cut}"
        assert cut.group in (1, heads[0] // heads[1]), name
        assert 16 <= cut.block_m <= full.block_m, name
        rows = n * cut.group
        if cut.block_m < full.block_m:
            assert cut.block_m // 2 < max(rows, 9) <= cut.block_m, name
        else:
            assert rows > full.block_m // 2 or full.block_m == 16, name
        config = configs.pick("step", arch, d, d, dtype, "only", cut.block_m)
        assert cut[1:2] + cut[3:] == config[1:], name


def test_many_queries_get_the_tables_tile_in_each_phase():
    for arch, phase in itertools.product(ARCHS, configs.PHASES):
        cut = choose_cut(64, 8, 128, 128, "bfloat16", arch, 1 << 20, phase)
        full = configs.pick("step", arch, 128, 128, "bfloat16", phase)
        assert cut.group == 1 and (*cut[:2], *cut[3:]) == full

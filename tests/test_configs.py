"""The table of configurations: every question has an answer, every row is one."""

import itertools
import pathlib

import pytest
from ringkern.kernels import configs

KERNELS = sorted({(row.kernel, row.bits) for row in configs.ROWS})
ARCHS = (80, 86, 87, 89, 90, 100, 103, 120)
PHASES = (*configs.PHASES, "*")


def questions():
    """Yield (kernel, arch, (headdim, headdim_v), dtype, phase). pack copies words, of 32 bits."""
    heads = [(32, 32), (64, 64), (80, 96), (128, 128), (128, 256), (192, 128), (256, 256)]
    for (kernel, bits), *rest in itertools.product(KERNELS, ARCHS, heads, configs.DTYPES, PHASES):
        if configs.DTYPES[rest[2]] == bits:
            yield kernel, *rest


def test_every_question_has_an_answer():
    asked = {(kernel, dtype) for kernel, _, _, dtype, _ in questions()}
    assert {("step", dtype) for dtype in configs.DTYPES} <= asked
    for kernel, arch, (headdim, headdim_v), dtype, phase in questions():
        config = configs.pick(kernel, arch, headdim, headdim_v, dtype, phase)
        assert config.block_m >= 1 and config.num_stages >= 1
        for power in (config.block_m, config.block_n, config.num_warps):
            assert power & (power - 1) == 0, f"{kernel} sm_{arch} {headdim}: {config}"


def test_every_row_is_reached():
    reached = {
        configs.find(kernel, arch, *heads, dtype, phase, rows)
        for kernel, arch, heads, dtype, phase in questions()
        for rows in (None, 16, 32, 64)
    }
    shadowed = [row for row in configs.ROWS if row not in reached]
    assert not shadowed


def test_rows_are_the_block_of_their_tile():
    for row in configs.ROWS:
        if row.rows is not None:
            assert row.kernel == "step" and row.rows == row.config.block_m, row


def test_a_program_can_have_its_registers():
    for row in configs.ROWS:
        registers = row.config.registers
        if row.kernel in ("merge", "pack"):  # which hold little, and are launched without a limit
            assert registers is None, row
        elif registers is not None:
            assert 0 < registers <= 255 and 32 * row.config.num_warps * registers <= 1 << 16, row


def test_a_tile_has_no_more_rows_than_it_has_use_for():
    for kernel, arch, heads, dtype, phase in questions():
        full = configs.pick(kernel, arch, *heads, dtype, phase)
        for rows in (1, 16, 17, 32, 33, 64, 65, 128, 129, 4096):
            config = configs.pick(kernel, arch, *heads, dtype, phase, rows)
            if kernel != "step":
                assert config == full
                continue
            want = min(max(16, 1 << (rows - 1).bit_length()), full.block_m)
            assert config.block_m == want, f"sm_{arch} {heads} {dtype} {phase} {rows} rows"
            if want == full.block_m:
                assert config == full


def test_families():
    assert [configs.family(arch) for arch in ARCHS] == [
        *("sm_80", "sm_86", "sm_80", "sm_86"),
        *("sm_90", "sm_100", "sm_100", "sm_86"),
    ]
    assert {configs.family(arch) for arch in ARCHS} == configs.SHARED_BYTES.keys()


def test_the_wider_head_decides():
    def row(*heads):
        return configs.find("step", 90, *heads, "bfloat16", "only")

    assert row(64, 64) != row(64, 65) == row(65, 64) == row(128, 128)


def test_bad_questions_are_refused():
    def ask(kernel="step", arch=90, headdim=64, dtype="bfloat16", phase="only"):
        return configs.pick(kernel, arch, headdim, 64, dtype, phase)

    assert ask()
    with pytest.raises(ValueError, match="arch: want .* 80 .*got 75"):
        ask(arch=75)
    with pytest.raises(ValueError, match="headdim: want 1 to 256, got 257 and 64"):
        ask(headdim=257)
    with pytest.raises(ValueError, match="headdim: want 1 to 256, got 0 and 64"):
        ask(headdim=0)
    with pytest.raises(ValueError, match="dtype: want .*got 'float64'"):
        ask(dtype="float64")
    with pytest.raises(ValueError, match="kernel: want one of .*step.*got 'stp'"):
        ask(kernel="stp")
    with pytest.raises(ValueError, match="phase: want .*middle.*got 'midle'"):
        ask(phase="midle")


def test_explain_is_one_line_that_names_the_row():
    line = configs.explain("step", 120, 80, 96, "float16", "middle")
    row = configs.find("step", 120, 80, 96, "float16", "middle")
    assert "\n" not in line
    for word in (f"{row.config.block_m} x {row.config.block_n}", f"<= {row.headdim}", "sm_120"):
        assert word in line, line
    line = configs.explain("step", 120, 80, 96, "float16", "middle", 17)
    assert "rows 17 is row" in line and line.endswith("rows <= 32"), line
    assert "4 warps, 2 stages, 255 registers: " in line, line
    line = configs.explain("step", 86, 256, 256, "float16", "middle", 32)
    assert "step 32 x 32" in line and "rows <=" not in line, "the tile of any rows has as few"


def test_nothing_is_tuned_at_run_time():
    """A rank that measures for itself may take another configuration, and give other bits."""
    folder = pathlib.Path(configs.__file__).parent
    for path in folder.glob("*.py"):
        assert "autotune" not in path.read_text(), path

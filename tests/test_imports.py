"""The layers of ringkern, as a test: data flows one way, so imports do too."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# module -> what it may import of ringkern. A module absent here may not exist.
ALLOWED = {
    "errors": set(),
    "types": set(),
    "shard": {"errors", "types"},
    "tiles": set(),
    "tile_table": {"errors"},
    "decode_table": {"tiles"},
    "pages": set(),
    "plan": {"errors", "shard", "upload"},
    "history": {"types"},
    "placement": {"errors", "history", "plan"},
    "progress": {"errors", "plan"},
    "schedule": {"errors", "tiles", "plan", "types"},
    "cost": {"tiles", "plan", "schedule", "types"},
    "profile": {"errors", "types"},
    "env": {"errors"},
    "stats": set(),
    "device_stats": {"capture", "stats"},
    "clock": set(),
    "trace": {"clock", "stats"},
    "tracer": {"errors", "env", "clock", "stats", "trace"},
    "problem": {"errors", "types"},
    "packed": {"errors"},
    "kernels": {"kernels"},
    "backend": {"env", "errors", "kernels", "types"},
    "ops": {"attn", "kernels"},
    "local": {
        "backend",
        "capture",
        "decode_table",
        "env",
        "errors",
        "kernels",
        "tile_table",
        "types",
        "upload",
    },
    "rendezvous": {"errors", "env"},
    "transport_local": {"errors"},
    "link": {"errors"},
    "join": {"env", "errors", "_C"},
    "topology": {"errors", "join"},
    "gpu": {"env", "errors", "join", "topology", "_C"},
    "transport": {
        "errors",
        "env",
        "gpu",
        "join",
        "link",
        "profile",
        "rendezvous",
        "topology",
        "transport_local",
        "_C",
    },
    "agreement": {"errors", "plan", "types"},
    "collectives": {"agreement", "errors"},
    "capture": set(),
    "turns": set(),
    "guard": set(),
    "upload": set(),
    "room": {"decode_table", "upload"},
    "program": {"blocks", "local", "plan", "room", "tiles", "types", "upload"},
    "programs": {"blocks", "errors", "plan", "program", "room", "schedule", "tiles", "types"},
    "blocks": {"cost", "plan", "types"},
    "cache": {
        "backend",
        "decode_table",
        "errors",
        "local",
        "pages",
        "placement",
        "plan",
        "problem",
        "progress",
        "upload",
    },
    "calibrate": {"guard", "local", "tiles", "profile", "types"},
    "ring": {
        "errors",
        "env",
        "types",
        "plan",
        "schedule",
        "cost",
        "local",
        "problem",
        "stats",
        "tracer",
        "cache",
        "capture",
        "calibrate",
        "agreement",
        "backend",
        "collectives",
        "device_stats",
        "guard",
        "programs",
        "turns",
        "upload",
    },
    "graphs": {"cache", "errors", "plan", "programs", "ring", "room", "schedule", "tiles"},
    "mesh": {"errors", "gpu", "rendezvous", "topology"},
    "attn": {"backend", "errors", "types", "tiles", "local", "problem", "packed"},
    "api": {
        "agreement",
        "errors",
        "shard",
        "plan",
        "problem",
        "packed",
        "ring",
        "schedule",
        "transport",
    },
}
# The command, and what only it runs.
PROGRAMS = {"cli", "__main__", "doctor", "launch", "model", "plan_printer", "workload"}
PROGRAMS |= {"demo", "demo_check", "demo_picture", "demo_report", "demo_session"}
NO_TORCH = {
    "errors",
    "types",
    "shard",
    "tiles",
    "tile_table",
    "decode_table",
    "pages",
    "plan",
    "history",
    "placement",
    "schedule",
    "cost",
    "profile",
    "env",
    "stats",
    "clock",
    "trace",
}


def modules():
    for base, prefix in ((ROOT / "python/ringkern", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(base.rglob("*.py")):
            if "kernels" in path.relative_to(base).parts or path.name == "__init__.py":
                continue
            yield prefix + ".".join(path.relative_to(base).with_suffix("").parts), path


def imports_of(path):
    """Return (ringkern modules, top-level packages) that the file imports."""
    ours, tops = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            tops.add(name.split(".")[0])
            if name.startswith("ringkern."):
                ours.add(name.removeprefix("ringkern."))
    return ours, tops


@pytest.mark.parametrize("name, path", [pytest.param(n, p, id=n) for n, p in modules()])
def test_layering(name, path):
    layer = name.split(".")[0]
    ours, tops = imports_of(path)
    if layer in PROGRAMS:
        return
    assert layer in ALLOWED, f"{name} is not in ALLOWED: say which layer it belongs to"
    bad = {o for o in ours if o.split(".")[0] not in ALLOWED[layer]}
    assert not bad, f"{name} may not import {sorted(bad)}"
    assert "kernels" not in tops, (
        f"{name}: `import kernels` would find another package of that name"
    )
    if name in NO_TORCH:
        assert not tops & {"torch", "triton"}, f"{name} must run without torch"


def test_planning_and_import_load_no_torch():
    code = (
        "import sys, ringkern, ringkern.schedule;"
        "plan = ringkern.Placement(3).prefill({'a': 7});"
        "ringkern.schedule.make_schedule(plan, 1);"
        "heavy = {'torch', 'triton', 'transformers', 'flash_attn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import ringkern

    for name in ringkern.__all__:
        assert getattr(ringkern, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ringkern.nonsense

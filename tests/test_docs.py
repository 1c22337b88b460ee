"""What docs/ says exists: messages, commands, variables, links; and its programs run."""

import ast
import importlib
import pathlib
import re
import shlex

import pytest
import ringkern
import torch
from close import assert_close
from ringkern import cli, env
from ringkern.kernels import reference
from ringkern.launch import launch
from ringkern.stats import Stats

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GAP = "…"  # what differs from one message to the next

each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)


def python_texts(source):
    """Return the strings of a Python file, with a gap for each value."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def cpp_texts(source):
    """Return the strings of a C++ file by statement, with a gap for what is between them."""
    literal = r'"((?:[^"\\\n]|\\.)*)"'
    source = re.sub(r"^\s*(?://|#).*$", "", source, flags=re.M)
    source = re.sub(r'"\s+"', "", source)  # the parts of one string
    statements = [[]]
    for found in re.finditer(literal + "|[;{}]", source):
        if found[1] is None:
            statements.append([])
        else:
            statements[-1].append(re.sub(r"\\(.)", r"\1", found[1]))
    return [f"{GAP}{GAP.join(parts)}{GAP}" for parts in statements if parts]


def all_texts():
    for path in (ROOT / "python/ringkern").glob("*.py"):
        yield from python_texts(path.read_text())
    for pattern in ("*.cpp", "*.h"):
        for path in (ROOT / "csrc").glob(pattern):
            yield from cpp_texts(path.read_text())


def quoted_messages():
    """Return the messages in the first columns of the tables in troubleshooting.md."""
    lines = (ROOT / "docs/troubleshooting.md").read_text().splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def test_every_message_in_troubleshooting_is_in_the_sources():
    texts, quotes = list(all_texts()), quoted_messages()
    assert len(quotes) > 30
    missing = [quote for quote in quotes if not any(quote in text for text in texts)]
    assert not missing


def test_texts_of_sources():
    """Messages are found whole, and none across two statements."""
    assert python_texts("f'a {x} ' 'b'")[0] == f"a {GAP} b"
    source = '// "no"\n throw E(concat("one ", x, " two "\n   "three"));\n  f("four"); g("a\\"b");'
    assert cpp_texts(source) == [
        f"{GAP}one {GAP} two three{GAP}",
        f"{GAP}four{GAP}",
        f'{GAP}a"b{GAP}',
    ]


def slug(heading):
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_document
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        if "://" in target:
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.M)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


def commands(path):
    """Return the command lines that a document shows, in blocks and in sentences."""
    text = re.sub(r"```python\n.*?```", "", path.read_text(), flags=re.S)
    blocks = re.findall(r"^    (\S.*)$", text, flags=re.M)
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S):
        blocks += block.replace("\\\n", " ").splitlines()
    sentences = re.findall(r"`([^`\n]+)`", text)
    return [line.strip() for line in (*blocks, *sentences)]


@each_document
def test_commands_and_their_options_exist(path):
    from torch.distributed.run import get_args_parser

    parsers = {"ringkern": cli.make_parser(), "torchrun": get_args_parser()}
    for line in commands(path):
        found = re.match(r"(?:[A-Z_]+=\S+ |srun )*(ringkern|torchrun) (.+)", line)
        if found:
            try:
                parsers[found[1]].parse_args(shlex.split(found[2]))
            except SystemExit:
                pytest.fail(f"no such command: {line}")
        found = re.match(r"make (\S+)", line)
        if found:
            assert re.search(rf"^{found[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), line


@each_document
def test_variables_and_functions_exist(path):
    text = path.read_text()
    assert set(re.findall(r"RINGKERN_[A-Z_]+", text)) <= set(env.VARIABLES)
    for module, name in re.findall(r"\bringkern((?:\.[a-z_]+)*)\.(\w+)\(", text):
        assert hasattr(importlib.import_module(f"ringkern{module}"), name), f"{module}.{name}"


def test_the_totals_in_traces_exist():
    text = (ROOT / "docs/traces.md").read_text()
    named = set(re.findall(r"`(\w+_ms|exposed|methods)`", text))
    assert len(named) == 7 and named <= set(Stats().to_dict())


def run_program(worker, source):
    exec(compile(source, "docs/running.md", "exec"), {})
    return True


@pytest.mark.parametrize("number, world_size", [(0, 2), (1, 4)])
def test_programs_run(number, world_size):
    text = (ROOT / "docs/running.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(programs) == 2
    done = launch(run_program, world_size, programs[number], threads=1, timeout_s=90)
    assert done == [True] * world_size


SMALL = {  # README's numbers, as a CPU has time and room for
    "num_layers=32": "num_layers=2",
    "for layer in range(32)": "for layer in range(2)",
    "for _ in range(32)": "for _ in range(3)",
    "nheads_k=8, headdim=128": "nheads_k=2, headdim=16",
    '"a": 5000': '"a": 500',
    '"a": 200': '"a": 20',
    "num_pages=1024": "num_pages=16",
    "8191": "819",
}


def run_readme(worker, programs):
    """Run README's programs, given what they leave to the reader, and compare their answers."""
    ring = ringkern.init_ring()
    plan = ringkern.Placement(ring.world_size).prefill({"a": 500, "b": 37})
    heads = [
        torch.randn(plan.total, n, 16, generator=torch.manual_seed(n)).bfloat16() for n in (4, 2, 2)
    ]
    q, k, v = (plan.shard(x, ring.rank) for x in heads)
    drawn = []  # [tokens, 64] of each forward(), whose two layers do the same

    def project(layer, x, positions):
        assert len(positions) == len(x)
        x = x.view(-1, 4, 16).bfloat16()
        return x, x[:, :2].contiguous(), x[:, 2:].contiguous()

    def finish(layer, x, out):
        return out.flatten(1) if layer else x

    def draw(count):
        drawn.append(torch.randn(count, 64, generator=torch.manual_seed(len(drawn))))
        return drawn[-1]

    given = dict(ring=ring, torch=torch, ringkern=ringkern, x=heads[0], q=q, k=k, v=v)
    given |= dict(prompts=537, follow_up=20, embed=draw, next_tokens=lambda x: draw(2))
    scope = given | dict(project=project, finish=finish)
    exec(compile(programs[0], "README.md", "exec"), {})
    for program in programs[1:]:
        exec(compile(program, "README.md", "exec"), scope)
    # The follow-up's queries saw all of "a", and nothing else.
    first, *steps, last = drawn
    a = torch.cat([first[:500], *(step[:1] for step in steps), last]).view(1, -1, 4, 16).bfloat16()
    want = reference.attn(a, a[:, :, :2], a[:, :, 2:], causal=True)[0][0, -20:].flatten(1)
    assert_close(scope["x"], want, want.bfloat16(), name="the follow-up")
    ring.close()
    return True


def test_readme_s_programs_run():
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    for old, new in SMALL.items():
        assert any(old in program for program in programs), old
        programs = [program.replace(old, new) for program in programs]
    assert len(programs) == 3
    assert launch(run_readme, 2, programs, threads=1, timeout_s=90) == [True] * 2

"""The floors of docs/extending.md: a file imports from its own floor, without circles, and from lower ones only; none
imports from the tests."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = ["ChannelAug", "data_loader", "data_manager", "eval_metrics", "loss", "model"]
SCRIPTS = ["pre_process_sysu", "testa", "train_ext_test0"]
FLOORS = ["utils", "core", "parts", MODULES, ["datasets", "methods"], "testing", "training", "drawing", SCRIPTS]
FLOORS += ["tools", "tools.search", ["tools.bench", "tools.benchmarks"]]


def floor(module):
    places = [(name, i) for i, names in enumerate(FLOORS) for name in ([names] if isinstance(names, str) else names)]
    return max((len(name), i) for name, i in places if module == name or module.startswith(f"{name}."))[1]


def test_imports_point_downward():
    files = {str(file.relative_to(ROOT))[:-3].replace("/", "."): file for file in ROOT.glob("*.py")}
    for folder in ("core", "parts", "testing", "training", "drawing", "tools"):
        files |= {str(file.relative_to(ROOT))[:-3].replace("/", "."): file for file in (ROOT / folder).rglob("*.py")}
    tests = {"tests", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}  # pytest finds them by either name
    imports = {}
    for module, file in files.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        assert not [name for name in names if name.split(".")[0] in tests], module
        imports[module] = names & files.keys()
        assert not [name for name in imports[module] if floor(name) > floor(module)], module
        assert module not in SCRIPTS or not imports[module] & {*SCRIPTS}, module
    assert len(list(TopologicalSorter(imports).static_order())) == len(files) > 50  # CycleError for a circle

"""Mutation tests: change the code at one place at a time, and see whether a fast test fails. `make mutants` runs it.

    python tests/mutants.py results.jsonl 10 training/step.py=0.4 loss.py

goes on from results.jsonl, stops after 10 minutes, and takes a random 40 % of the mutants of step.py. The tests run
once, which notes the functions that each calls. Each mutant is then a fork of this process, in which one function has
other code: it runs the tests that call the function, the fastest first, until one fails or they have taken SECONDS.
Messages, default values and code outside functions are not changed. Survivors that tests/mutants.md explains are not
printed.
"""

import ast
import collections
import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

ROOT, JOBS, SECONDS = Path(__file__).parents[1], 2, 60
TESTS = {
    "training/engine.py": "training distributed",
    "testing/engine.py": "training distributed results eval_metrics testa",
    "training/step.py": "training",
    "training/run.py": "run training distributed",
    "training/optim.py": "training train dns formats run",
    "core/meter.py": "training distributed run formats",
    "core/distributed.py": "distributed run",
    "testing/evaluation.py": "testa features published run regdb",
    "testing/results.py": "results report testa formats",
    "data_loader.py": "data_loader datasets distributed regdb formats bad_input",
    "loss.py": "loss training gfm2 deen dns quad distributed",
    "methods.py": "loss training gfm2 deen dns quad rle clip distributed testa formats",
    "model.py": "model gfm2 deen dns rle quad clip published formats",
    "eval_metrics.py": "eval_metrics results re_rank tracks",
    "ChannelAug.py": "augmentation gfm2 deen dns quad rle",
    "drawing/figures.py": "figures visualize report sweep verification corruptions",
    "tools/sweep_tables.py": "sweep",
    "tools/search/index.py": "index search search_watch tracks",
    "tools/search/file_index.py": "index search search_page search_watch tracks",
    "tools/search/finder.py": "search index verification tracks search_watch",
    "parts/clip.py": "clip",
    "parts/deen.py": "deen",
    "parts/distances.py": "loss dns quad gfm2",
    "parts/dns.py": "dns",
    "parts/heads.py": "model deen",
    "parts/non_local.py": "model quad published",
    "parts/published.py": "published",
    "parts/quad.py": "quad",
    "parts/rle.py": "rle",
    "testing/corruptions.py": "corruptions",
    "testing/features.py": "features",
    "testing/re_rank.py": "re_rank testa search",
    "testing/verification.py": "verification search",
    "core/images.py": "images data_loader data_manager bad_input shortages tracks",
    "data_manager.py": "data_manager datasets llcm regdb tracks check_data bad_input",
    "datasets.py": "datasets data_loader tracks testa check_data bad_input",
    "tools/embedder.py": "search tracking index shortages export public_reports",
    "tools/search/labels.py": "search search_page tracks index search_watch public_reports",
    "tools/search/indexer.py": "search tracks index search_watch public_reports",
}
EXPORTS = "tests/test_augmentation.py::test_normalise_is_the_same_after_an_export"
EXPLAINED = ROOT / "tests" / "mutants.md"
# Arguments that say where tensors are, what has one length anyway, and what a screen shows: not changed.
UNSEEN = ("device", "non_blocking", "strict", "desc", "unit", "leave", "help")
# How a figure looks. What it shows, and that nothing hides it, is tested.
UNSEEN += ("fontsize", "figsize", "layout", "labelpad", "linespacing", "linewidth", "markersize", "s", "alpha")
UNSEEN += ("markeredgewidth", "frameon", "interpolation", "solid_capstyle", "quality", "optimize", "zorder", "mfc")
UNSEEN += ("facecolors", "edgecolors", "loc", "ncols", "height_ratios", "grid", "tick_params", "set_visible")
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, In NotIn, Is IsNot, And Or, Add Sub, Mult Div, BitAnd BitOr"
SWAPS = {getattr(ast, a): getattr(ast, b) for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}


def changes(node):
    """Other values of a node's fields: (field, value)."""
    match node:
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=int() | float() as value):
            yield "value", value + 1
        case ast.Constant(value=str(value)):
            yield "value", value + "X"
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "ops", [SWAPS[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield "op", SWAPS[type(op)]()
        case ast.UnaryOp(op=op, operand=operand):
            yield "operand", ast.UnaryOp(op, operand)
        case ast.If() | ast.IfExp() | ast.While():
            yield "test", ast.UnaryOp(ast.Not(), node.test)
        case ast.comprehension(ifs=[test]):
            yield "ifs", [ast.UnaryOp(ast.Not(), test)]
        case ast.Return(value=ast.Constant(value=None)):
            pass  # already what follows would make of it
        case ast.Expr(value=ast.Call()) | ast.Return(value=ast.expr()):
            yield "value", ast.Constant(None)
        case ast.Call(keywords=words):
            for word in words:
                if word.arg not in UNSEEN:
                    yield "keywords", [other for other in words if other is not word]


def below(node):
    """All nodes below this one, but docstrings, messages, default values, decorators and UNSEEN arguments."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            kept = isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr | ast.arguments)
            kept = kept and not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
            name = getattr(child, "arg", None) or getattr(
                getattr(getattr(child, "value", None), "func", None), "attr", None
            )
            if kept and field not in ("decorator_list", "returns") and name not in UNSEEN:
                yield child
                yield from below(child)


def mutants(file):
    """All of a file: (name of the function, tree of the module, node, field, other value)."""
    tree = ast.parse((ROOT / file).read_text())
    for outer in tree.body:
        for function in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
            if isinstance(function, ast.FunctionDef):
                name = function.name if function is outer else f"{outer.name}.{function.name}"
                yield from ((name, tree, node, *change) for node in below(function) for change in changes(node))


def mutated(file, name, tree, node, field, value):
    """-> (the function's other code, its line, what has changed); the tree stays as it was."""
    kept, before = getattr(node, field), ast.unparse(node).split("\n")[0]
    setattr(node, field, value)
    text = f"{file} {name}: `{before}` -> `{ast.unparse(node).splitlines()[0]}`"
    code = compile(ast.fix_missing_locations(tree), str(ROOT / file), "exec")
    setattr(node, field, kept)
    for part in range(1, 2 + name.count(".")):
        qualified = ".".join(name.split(".")[:part])
        code = next(x for x in code.co_consts if isinstance(x, types.CodeType) and x.co_qualname == qualified)
    return code, next(x.lineno for x in ast.walk(node) if hasattr(x, "lineno")), text


class Driver:
    """A plugin of pytest that runs the tests in its own way."""

    def __init__(self, out, minutes, shares):
        self.out, self.end, self.shares = Path(out), time.monotonic() + 60 * float(minutes), shares
        self.calls, self.seconds, self.hits, self.by_fixture = collections.defaultdict(set), {}, set(), {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """Tests that share a fixture call what it calls, though only the first of them sets it up."""
        outer, self.hits = self.hits, set()
        try:
            return (yield)
        finally:
            self.by_fixture[fixturedef], self.hits = self.hits, outer

    def pytest_runtestloop(self, session):
        self.outside = types.SimpleNamespace(listchain=lambda: [session])  # a next test for which only the session's
        self.measure(session.items)  # fixtures stay
        quick = [test for test, seconds in self.seconds.items() if seconds < 1]
        while quick and (test := self.attempt(quick, [], None)):  # without a change
            self.leave_out(test, "in a fork")
            quick.remove(test)
        todo = []
        for file, share in self.shares.items():
            found, tried = list(mutants(file)), {entry["number"] for entry in self.results(file)}
            chosen = random.Random(0).sample(range(len(found)), round(share * len(found)))
            todo += [(file, number, found[number]) for number in chosen if number not in tried]
        random.Random(0).shuffle(todo)
        self.functions = collections.defaultdict(list)
        gc.unfreeze()  # what conftest.py has hidden
        for function in (thing for thing in gc.get_objects() if type(thing) is types.FunctionType):
            self.functions[function.__code__.co_filename, function.__code__.co_qualname].append(function)
        lost = {name for file, _, (name, *_) in todo if (str(ROOT / file), name) in self.calls.keys() - self.functions}
        assert not lost, f"called, but not found: {', '.join(sorted(lost))}"
        workers = []
        for index in range(JOBS):
            if not (pid := os.fork()):
                with contextlib.suppress(KeyboardInterrupt):
                    self.work(todo[index::JOBS])
                os._exit(0)
            workers.append(pid)
        for pid in workers:
            os.waitpid(pid, 0)
        return True

    def measure(self, tests):
        """Run all, and note the seconds and the called functions of each."""

        def note(frame, *_):
            self.hits.add((frame.f_code.co_filename, frame.f_code.co_qualname.split(".<locals>")[0]))

        for test, following in zip(tests, [*tests[1:], self.outside], strict=True):
            self.hits, start = set(), time.monotonic()
            threading.settrace(note)
            sys.settrace(note)
            failed = any(report.failed for report in runtestprotocol(test, log=False, nextitem=following))
            sys.settrace(None)
            threading.settrace(None)
            if failed:
                self.leave_out(test, "when it is traced")
                continue
            self.seconds[test] = time.monotonic() - start
            fixtures = [definitions[-1] for definitions in test._fixtureinfo.name2fixturedefs.values()]
            for hit in self.hits.union(*(self.by_fixture.get(fixture, ()) for fixture in fixtures)):
                self.calls[hit].add(test)

    def leave_out(self, test, where):
        print(f"left out: {test.nodeid}, which fails {where} without a change")
        for tests in self.calls.values():
            tests.discard(test)

    def work(self, todo):
        for file, number, mutant in todo:
            if time.monotonic() > self.end:
                return
            code, line, text = mutated(file, *mutant)
            place = str(ROOT / file), mutant[0]
            tests = sorted(self.calls[place], key=self.seconds.get)
            sums = itertools.accumulate(map(self.seconds.get, tests))
            tests = [test for test, seconds in zip(tests, sums, strict=True) if seconds < SECONDS] or tests[:1]
            status = "not called by a test"
            if tests:
                status = "killed" if self.attempt(tests, self.functions[place], code) else "survived"
            entry = {"file": file, "source": source(file), "number": number, "line": line, "text": text}
            with self.out.open("a") as out:
                out.write(json.dumps(entry | {"status": status}) + "\n")

    def attempt(self, tests, functions, code):
        """Run tests in a fork in which functions have other code -> the one that failed, or None."""
        folder = self.out.with_suffix(f".{os.getpid()}").absolute()
        running = folder.with_name(f"{folder.name}.test")  # beside the folder, which tests may remove
        folder.mkdir()
        running.write_text("0")
        if not (pid := os.fork()):
            os.setsid()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            tests[0].config._tmp_path_factory._basetemp = folder
            try:
                for function in functions:
                    function.__code__ = code
                for number, (test, following) in enumerate(zip(tests, [*tests[1:], self.outside], strict=True)):
                    running.write_text(str(number))
                    signal.alarm(20 + int(10 * self.seconds[test]))  # some mutants hang
                    if any(report.failed for report in runtestprotocol(test, log=False, nextitem=following)):
                        os._exit(1)
            except BaseException:
                os._exit(2)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # processes that it has started
        failed = tests[int(running.read_text())] if status else None
        running.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return failed

    def results(self, file):
        """Of the file as it is now."""
        entries = map(json.loads, self.out.read_text().splitlines() if self.out.exists() else ())
        return [entry for entry in entries if (entry["file"], entry["source"]) == (file, source(file))]


def source(file):
    return zlib.crc32((ROOT / file).read_bytes())


def main(out, minutes, *files):
    driver = Driver(out, minutes, {file.partition("=")[0]: float(file.partition("=")[2] or 1) for file in files})
    tests = sorted({f"tests/test_{name}.py" for file in driver.shares for name in TESTS[file].split()})
    options = ["-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    options.append(f"--deselect={EXPORTS}")  # once PyTorch has exported something, `backward` hangs in forks
    if pytest.main([*options, *tests], plugins=[driver]) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return 1
    explained = EXPLAINED.read_text()
    for file in driver.shares:
        results = driver.results(file)
        print(f"{file}: {sum(entry['status'] == 'killed' for entry in results)} of {len(results)} mutants killed")
        for entry in sorted(results, key=lambda entry: entry["number"]):
            function, _, change = entry["text"].partition(": ")
            if entry["status"] != "killed" and entry["text"] not in explained and f"{function}: all" not in explained:
                print(f"  line {entry['line']}, {entry['status']}: {function.split()[1]}: {change}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 3 else print("none of the files differs"))

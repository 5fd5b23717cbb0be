"""What the source text may hold. Each guard is also run on a tree that breaks it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("pvcore", "kernels/pvcore_kernels")
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 40
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
HOOK_DOOR = "pvcore/taps.py"
REGISTERS_HOOK = re.compile(r"register_\w*hook")
# Preceded by nothing that would make it the middle of a URL or of a relative path.
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:root|home|work|tmp|Users)/")
MARKS = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")


def modules(root: Path, folders: Iterable[str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def oversized(root: Path) -> list[str]:
    found = []
    for path in modules(root, (*SHIPPED, "benches")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        if (lines := len(text.splitlines())) > MAX_MODULE_LINES:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    return found


def nameless(root: Path) -> list[str]:
    return [str(p) for p in modules(root, (*SHIPPED, "benches", "tests")) if p.stem in NAMELESS]


def hook_registrations(root: Path) -> list[str]:
    found = []
    for path in modules(root, SHIPPED):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(attr=word) | ast.Name(id=word) | ast.alias(name=word):
                    pass
                case ast.Constant(value=str(word)):  # getattr(module, "...")
                    pass
                case _:
                    continue
            if name != HOOK_DOOR and REGISTERS_HOOK.fullmatch(word):
                found.append(f"{name}:{node.lineno} {word}")
    return found


def tracked_texts(root: Path) -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode("utf-8")


def lines_matching(root: Path, pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number} {line.strip()[:80]}"
        for name, text in tracked_texts(root)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_modules_and_functions_stay_small() -> None:
    assert oversized(ROOT) == []


def test_the_size_guard_can_fail(tmp_path: Path) -> None:
    write(tmp_path, "pvcore/long.py", "x = 1\n" * (MAX_MODULE_LINES + 1))
    write(tmp_path, "pvcore/fits.py", "x = 1\n" * MAX_MODULE_LINES)
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    write(tmp_path, "kernels/pvcore_kernels/deep.py", f"class A:\n  async def f():\n{body}")
    assert oversized(tmp_path) == [
        "pvcore/long.py: 401 lines",
        "kernels/pvcore_kernels/deep.py:2 f: 41 lines",
    ]


def test_modules_are_named_after_what_they_hold(tmp_path: Path) -> None:
    assert nameless(ROOT) == []
    write(tmp_path, "pvcore/world/helpers.py", "")
    assert len(nameless(tmp_path)) == 1


def test_only_taps_registers_torch_hooks() -> None:
    assert hook_registrations(ROOT) == []


def test_the_hook_guard_can_fail(tmp_path: Path) -> None:
    write(tmp_path, HOOK_DOOR, "block.register_forward_hook(f)\n")
    assert hook_registrations(tmp_path) == []
    smuggled = [
        "block.register_forward_pre_hook(f)",
        "from torch.nn.modules.module import register_module_forward_hook",
        "getattr(block, 'register_full_backward_hook')(f)",
    ]
    write(tmp_path, "pvcore/world/train.py", "\n".join(smuggled))
    write(tmp_path, "kernels/pvcore_kernels/steer.py", "h.register_hook(f)\n")
    assert hook_registrations(tmp_path) == [
        "pvcore/world/train.py:2 register_module_forward_hook",
        "pvcore/world/train.py:1 register_forward_pre_hook",
        "pvcore/world/train.py:3 register_full_backward_hook",
        "kernels/pvcore_kernels/steer.py:1 register_hook",
    ]


def test_no_tracked_text_names_a_path_of_one_machine() -> None:
    # Such a path works for its author alone, and a record that holds one cannot be repeated.
    assert lines_matching(ROOT, MACHINE_PATH) == []


def test_no_tracked_text_promises_work_for_later() -> None:
    assert lines_matching(ROOT, MARKS) == []


def test_the_text_guards_can_fail(tmp_path: Path) -> None:
    write(tmp_path, "README.md", "see https://example.org/home/page and vectors/tmp/evil\n")
    write(tmp_path, "record.json", '{"command": "python /' + 'home/ada/run.py"}\n')
    write(tmp_path, "plan.py", "x = 1  # TO" + "DO later\n")
    write(tmp_path, "untracked.py", "# FIX" + "ME\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "README.md", "record.json", "plan.py"], cwd=tmp_path, check=True)
    assert [line.split()[0] for line in lines_matching(tmp_path, MACHINE_PATH)] == ["record.json:1"]
    assert [line.split()[0] for line in lines_matching(tmp_path, MARKS)] == ["plan.py:1"]

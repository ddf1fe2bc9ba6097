"""Makes docs/api.md out of the library's docstrings: python -m tests.api.reference > docs/api.md

What is written there is what the code says: signatures, and the docstrings of classes, functions and attributes.
"""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

API = Path(__file__).parents[2] / "ckptfs"

HEAD = """\
# The library

    import ckptfs

Importing it costs nothing until one of its names is used. Errors are OSError and those of `ckptfs.errors`:
`CheckpointError` (the file), `CommandError` (the caller), `StateError` (not now), `StorageError` (the storage). All
of these are `CkptfsError`, with an `errno`. Sizes and offsets are in bytes. This file is made of the docstrings by
`python -m tests.api.reference`.
"""

PUBLIC = (
    ("ckptfs.open", "api/checkpoint.py", "open_checkpoint"),
    ("OpenCheckpoint", "api/checkpoint.py", "OpenCheckpoint"),
    ("Block", "api/blocks.py", "Block"),
    ("PhysicalMemory", "api/blocks.py", "PhysicalMemory"),
    ("DeviceState", "physical/devices.py", "DeviceState"),
    ("ckptfs.mounted", "api/mount.py", "mounted"),
    ("ckptfs.Mount", "api/mount.py", "Mount"),
    ("MountedMemory", "api/memory.py", "MountedMemory"),
    ("Events", "api/mount.py", "Events"),
)


def markdown() -> str:
    """All of docs/api.md."""
    return "\n".join([HEAD, *(part for entry in PUBLIC for part in _entry(*entry))])


def _entry(name: str, path: str, symbol: str) -> Iterator[str]:
    module = ast.parse((API / path).read_text())
    node = next(node for node in module.body if getattr(node, "name", None) == symbol)
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    yield f"## {name}\n"
    if isinstance(node, ast.FunctionDef):
        yield f"    {name}({_arguments(node)}) -> {_type(node.returns)}\n"
        yield _example(ast.get_docstring(module) or "")
    yield _text(ast.get_docstring(node) or "") + "\n"
    if isinstance(node, ast.ClassDef):
        yield "".join(f"* {line}\n" for line in _members(node))


def _example(docstring: str) -> str:
    """The block of code in a module's docstring."""
    return docstring.partition("::\n\n")[2] + "\n"


def _members(node: ast.ClassDef) -> Iterator[str]:
    """A line for each documented attribute and method."""
    init = next((one for one in node.body if getattr(one, "name", "") == "__init__"), None)
    yield from _attributes(node.body)
    yield from _attributes(init.body if isinstance(init, ast.FunctionDef) else [])
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
            is_property = any("property" in ast.unparse(decorator) for decorator in one.decorator_list)
            shown = f"`{one.name}: {_type(one.returns)}`" if is_property else f"`{_call(one)}`"
            yield f"{shown}: {_line(ast.get_docstring(one) or '')}"


def _attributes(body: list[ast.stmt]) -> Iterator[str]:
    """Attributes with a string behind them, or with a type of their own."""
    for one, following in pairwise([*body, ast.Pass()]):
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(one, ast.AnnAssign) and "_" not in ast.unparse(one.target).removeprefix("self.")[:1]:
            text = _line(ast.literal_eval(following.value)) if documented else ""
            yield f"`{ast.unparse(one.target)}: {_type(one.annotation)}`" + (f": {text}" if text else "")
        elif isinstance(one, ast.Assign) and documented:
            name = ast.unparse(one.targets[0]).removeprefix("self.")
            yield f"`{name}`: {_line(ast.literal_eval(following.value))}"


def _call(node: ast.FunctionDef) -> str:
    returns = "" if _type(node.returns) == "None" else f" -> {_type(node.returns)}"
    return f"{node.name}({_arguments(node)}){returns}"


def _arguments(node: ast.FunctionDef) -> str:
    return ast.unparse(node.args).removeprefix("self, ").removeprefix("self")


def _type(node: ast.expr | None) -> str:
    return ast.unparse(node).strip("'") if node is not None else "None"


def _line(docstring: str) -> str:
    return " ".join(_text(docstring).split())


def _text(docstring: str) -> str:
    """A docstring in Markdown: code is between single quotes of that kind, and a block follows `::`."""
    return re.sub(r"^::\n\n", "", docstring.replace("``", "`"), flags=re.MULTILINE)


if __name__ == "__main__":
    print(markdown(), end="")

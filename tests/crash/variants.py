"""The real code with one of its promises taken out: each must be noticed, or the checks show nothing."""

import ast
import inspect
import os
from collections.abc import Callable
from pathlib import Path

from isochamber.build import durable, home
from isochamber.launch import syscalls


def _without_file_sync() -> None:
    """Files are renamed without fsync(2); directories are still synced."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def _without_directory_sync() -> None:
    durable.sync_directory = lambda path: None


def _without_tree_sync() -> None:
    syscalls.syncfs = lambda fd: None


def _sync_after_rename() -> None:
    real = durable.sync_tree
    later: list[Path] = []
    durable.sync_tree = later.append  # type: ignore[assignment]
    rename = syscalls.rename_noreplace

    def rename_then_sync(source: str, target: str) -> None:
        rename(source, target)
        later.clear()
        real(Path(target))

    syscalls.rename_noreplace = rename_then_sync


VARIANTS: dict[str, Callable[[], None]] = {
    "without file sync": _without_file_sync,
    "without directory sync": _without_directory_sync,
    "without tree sync": _without_tree_sync,
    "sync after rename": _sync_after_rename,
}


# Every single call that syncs, taken out of the source.

_MODULES = {"durable": durable, "home": home}
_CALLS = {"sync_directory", "sync_tree", "_sync_both", "fsync", "syncfs"}


def sites() -> list[str]:
    """Return ``module:line:call`` for every statement that is nothing but a sync."""
    return [
        f"{name}:{node.lineno}:{called}"  # type: ignore[attr-defined] # a statement has one
        for name, module in _MODULES.items()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if (called := _synced_by(node)) is not None
    ]


def is_without_need(site: str) -> bool:
    """Say whether nothing is lost without this one: the sync of a rename's source directory, and the reserve's."""
    return _line_of(site) == "sync_directory(source)" or "reserve" in _function_of(site)


def is_not_in_the_workload(site: str) -> bool:
    """Say whether only a disk image (``limits: disk``) is synced there: no tenant of the workload has one."""
    return "def sync_file(" in _function_of(site)


def _line_of(site: str) -> str:
    name, _, line = site.partition(":")
    if name not in _MODULES:
        return ""
    return inspect.getsource(_MODULES[name]).splitlines()[int(line.partition(":")[0]) - 1].strip()


def _function_of(site: str) -> str:
    name, _, line = site.partition(":")
    if name not in _MODULES:
        return ""
    text = inspect.getsource(_MODULES[name]).splitlines()[: int(line.partition(":")[0])]
    return next(word for word in reversed(text) if word.startswith("def "))


def _synced_by(node: ast.AST) -> str | None:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return None
    function = node.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return name if name in _CALLS else None


class _Without(ast.NodeTransformer):
    def __init__(self, line: int) -> None:
        self._line = line

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if node.lineno == self._line else node


def _take_out(site: str) -> None:
    name, line, _ = site.split(":")
    module = _MODULES[name]
    changed = _Without(int(line)).visit(ast.parse(inspect.getsource(module)))
    exec(compile(changed, str(module.__file__), "exec"), module.__dict__)


def apply(name: str | None) -> None:
    """Change this process's code as ``name`` says: one of VARIANTS, or of sites()."""
    if name in VARIANTS:
        VARIANTS[name]()
    elif name is not None:
        _take_out(name)

"""The lists of policy.py as the tables of docs/explanation/seccomp.md."""

from collections.abc import Iterable

from isochamber.spec import policy


def denied() -> list[str]:
    """Return the lines of the table of what is refused."""
    grouped: dict[tuple[str, str, bool], list[str]] = {}
    for row in policy.DENIED.values():
        grouped.setdefault((row.why, row.errno, row.approvable), []).append(row.name)
    rows = (
        (" ".join(f"`{name}`" for name in names), why, _answer(error), "yes" if approvable else "")
        for (why, error, approvable), names in grouped.items()
    )
    return _table(("refused", "it is", "answer", "may be approved"), rows)


def _answer(error: str) -> str:
    return "nothing is done, and no error" if error == policy.PRETENDS else f"`{error}`"


def dangerous() -> list[str]:
    """Return the lines of the table of what is asked about after learning."""
    return _table(("call", "it"), ((f"`{name}`", why) for name, why in policy.DANGEROUS.items()))


def always() -> str:
    """Return the list of what every program needs."""
    return ", ".join(f"`{name}`" for name in policy.ALWAYS)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]

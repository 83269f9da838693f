"""Which of the project's tests run inside: a chosen few at every run, whole directories by ``./doit test:vm``."""

from tests.conftest import PROJECT

# The longest first: two run at a time.
WHOLE = (
    "tests/escape",
    "tests/limits",
    "tests/launch",
    "tests/seccomp",
    # Of tests/net what the kernel decides; what the project repairs takes half a minute a test inside.
    "tests/net/test_made.py",
    "tests/net/test_policy.py",
    "tests/net/test_ports.py",
    "tests/net/test_spoofing.py",
)


def whole() -> list[str]:
    """Return those that there are."""
    return [name for name in WHOLE if (PROJECT / name).exists()]


def chosen() -> list[str]:
    """Return the files with tests that carry the marker ``guest``: collecting all others would take a minute inside."""
    files = (path for path in (PROJECT / "tests").rglob("test_*.py") if "pytest.mark.guest" in path.read_text())
    return sorted(str(path.relative_to(PROJECT)) for path in files)

"""The one adapter between our errors and doit's: a line instead of a traceback."""

from collections.abc import Callable

from doit.exceptions import TaskFailed

from isochamber.errors import IsochamberError


class OneLineFailure(TaskFailed):  # type: ignore[misc] # doit ships no types
    """A failure whose whole report is the lines of an :class:`IsochamberError`."""

    def __init__(self, error: IsochamberError) -> None:
        super().__init__("\n".join(error.lines()))
        self.exit_code = error.exit_code


def action(step: Callable[..., object], *args: object) -> Callable[[], TaskFailed | None]:
    """Wrap ``step(*args)`` as a doit action: an IsochamberError becomes a returned failure.

    doit prints a traceback for an exception in an action and none for a returned
    TaskFailed. OSErrors are made into lines where their cause is known; one that
    gets here is a bug and keeps its traceback.
    """

    def run() -> TaskFailed | None:
        try:
            step(*args)
        except IsochamberError as error:
            return OneLineFailure(error)
        return None

    return run


def up_to_date(check: Callable[..., bool], *args: object) -> Callable[[], bool]:
    """Wrap ``check(*args)`` as a doit uptodate: a check that fails means "no", and the action then says why."""

    def current() -> bool:
        try:
            return check(*args)
        except IsochamberError:
            return False

    return current

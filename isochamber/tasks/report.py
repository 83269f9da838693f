"""What doit says while it works: one line a task that ran, our error lines, nothing for what is current."""

import sys

from doit.exceptions import BaseFail
from doit.reporter import ConsoleReporter
from doit.task import Task

from isochamber.tasks.foreground import COMMAND

# What the run left to do and to say, for the entry point: doit makes and drops the reporter itself.
to_start: list[list[str]] = []
exit_code: int | None = None


class Reporter(ConsoleReporter):  # type: ignore[misc] # doit ships no types
    """doit's console reporter with our error lines, quiet about up-to-date tasks when a tenant is to run."""

    desc = "one line a task, errors as one line each"

    def execute_task(self, task: Task) -> None:
        """Name a task that has work to do; a foreground task speaks for itself."""
        if task.actions and COMMAND not in (task.meta or {}):
            self.write(f".  {task.title()}\n")
            self.outstream.flush()

    def skip_uptodate(self, task: Task) -> None:
        """Say nothing: a thousand current tenants are no news."""

    def add_success(self, task: Task) -> None:
        """Remember what is to be started when the graph is done."""
        command = (task.meta or {}).get(COMMAND)
        if command:
            to_start.append(command)

    def add_failure(self, task: Task, fail: BaseFail) -> None:
        """Print the lines of an error that we raised; anything else as doit does."""
        global exit_code  # noqa: PLW0603 - read once, by the entry point
        code = getattr(fail, "exit_code", None)
        if code is None:
            super().add_failure(task, fail)
            return
        exit_code = exit_code or code
        self.outstream.flush()
        for number, line in enumerate(fail.get_msg().splitlines()):
            sys.stderr.write(f"isochamber: {line}\n" if number == 0 else f"{line}\n")

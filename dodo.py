"""The task graph, for doit: everything is in isochamber.tasks."""

from doit.exceptions import InvalidDodoFile

from isochamber.errors import SpecError
from isochamber.tasks.dodo import load_pipeline, namespace

try:
    globals().update(namespace(load_pipeline()))
except SpecError as error:
    raise InvalidDodoFile("\n".join(error.lines())) from None

"""The two ends of a command that are one line: bad input, and a run that cannot continue.

Any other exception is a bug of ours and keeps its traceback.
"""


class BadInput(ValueError):
    """Something that the user gave cannot be used. The text is one line that names the file, line and key."""


class Stopped(RuntimeError):
    """A run cannot continue, and not by a bug of ours: servers are gone, say, or a loss is not finite."""


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

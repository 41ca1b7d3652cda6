"""The one error that is the user's to mend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: one line that names the file, row, field or flag and says what to do.

    Commands print it on stderr and exit with code 2; everything else that escapes is our bug.
    """


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """A small command's whole work: an InputError ends it with its line and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

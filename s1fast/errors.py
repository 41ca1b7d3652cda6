"""The one error that is the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one line that names the file, row, field or flag and says what to do.

    Commands print it on stderr and exit with code 2; everything else that escapes is our bug.
    """

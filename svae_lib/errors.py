r"""The error that a user can mend."""


class UserError(Exception):
    r"""One clear sentence that says what is wrong and what to do; printed without a traceback."""

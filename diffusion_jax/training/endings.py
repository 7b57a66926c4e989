"""How a training ends before its last step."""


class Stopped(BaseException):
    """The run received SIGTERM or SIGINT. It can be resumed from its last checkpoint.

    Like KeyboardInterrupt it is not an Exception, so code that handles errors of libraries does not catch it.
    """


class Diverged(ArithmeticError):
    """The loss was not finite for too many steps in a row."""

"""Text of errors, for use in messages."""


def one_line(error: BaseException) -> str:
    """The whole message of an error on one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def first_line(error: Exception) -> str:
    """The first line of an error of another library."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]

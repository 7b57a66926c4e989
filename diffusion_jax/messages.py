"""What error messages are made of."""


def one_line(error: BaseException) -> str:
    """The whole message of an error, its lines joined."""
    return " ".join(line.strip() for line in str(error).splitlines())


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]

"""What error messages are made of."""


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]

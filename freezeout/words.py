"""What is said to a person: durations, sizes, and errors of others in a line."""


def duration(seconds: float) -> str:
    """Seconds, to two digits; minutes; or hours and minutes.

    >>> duration(0.123), duration(42.3), duration(300), duration(-7300)
    ('0.12 s', '42 s', '5 min', '-2 h 2 min')
    """
    seconds = round(seconds, 2) + 0.0  # never -0.0
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 90:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes.

    >>> size(1536), size(3.2e9)
    ('1.5 KiB', '2.98 GiB')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            number = count / factor
            # From 1000 on, three digits would be 1e+03.
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
    return f"{count:.0f} B"


def first_line(error: BaseException) -> str:
    """Of what the error says; empty if it says nothing.

    >>> first_line(ValueError("no such layer\\n  in line 3"))
    'no such layer'
    """
    return str(error).strip().partition("\n")[0].rstrip()

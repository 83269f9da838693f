"""JSON out, for who can't pay for importing json, nor even the C half of it: a client of the supervisor."""


def dump(value: object) -> str:
    """Return ``value`` (None, bool, int, float, str, lists and dicts with text keys of them) as JSON."""
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quoted(key)}:{dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(dump, value)) + "]"
    raise TypeError(f"{type(value).__name__} does not travel")


def _quoted(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    from isochamber.launch import lean  # noqa: PLC0415 - nearly no request comes here

    return lean.quote(text)

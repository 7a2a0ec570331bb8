"""Tables in Markdown."""


def markdown(lines: list[list[str]]) -> str:
    """Return a table with aligned columns, readable as plain text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "".join(
        "| " + " | ".join(map(str.ljust, line, widths)) + " |\n"
        for line in [lines[0], rule, *lines[1:]]
    )

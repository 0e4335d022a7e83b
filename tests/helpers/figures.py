"""Figures that were drawn."""

PNG = b"\x89PNG\r\n\x1a\n"


def is_png(path):
    """Whether a file is a PNG image with something in it, by its header."""
    data = path.read_bytes()
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return data.startswith(PNG) and data[12:16] == b"IHDR" and min(width, height) > 100

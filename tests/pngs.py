"""PNG files as few writers make them: of any depth, colour type and further chunks."""

import struct
import zlib


def png(path, depth, colour, rows, *after):
    """Writes a PNG of packed rows of bytes; `after` are chunks (kind, content) behind the pixels."""
    width = rows.shape[1] * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), (b"IDAT", data), *after, (b"IEND", b"")]
    chunks = (struct.pack(">I", len(each)) + kind + each + struct.pack(">I", zlib.crc32(kind + each)) for kind, each in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

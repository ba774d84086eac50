"""Frames as MP4 and as a contact sheet. Runs inside Triton beside model.py; imports nothing of this project."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
from PIL import Image

SHEET_COLUMNS = 4
SHEET_FRAMES = 8
SHEET_WIDTH = 1024  # pixels at most, so that a sheet stays well below 300 kB
MIN_TILE_WIDTH = 96  # smaller frames are enlarged, or nothing could be seen of a tiny model's


def mp4(frames: np.ndarray, fps: int) -> bytes:
    """H.264 in MP4 of uint8 RGB frames, shape (frames, height, width, 3); sizes are even, as the request's check asks.

    It is lossy (CRF 18): compare frames by the `tensor` output, not by this.
    """
    import av  # only here: contact sheets do without its 35 MB

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def sheet(frames: np.ndarray) -> bytes:
    """A JPEG of up to 8 frames, evenly spread over the clip, first and last among them, in rows of 4."""
    count = min(SHEET_FRAMES, len(frames))
    picked = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    columns = min(SHEET_COLUMNS, len(picked))
    height, width = frames.shape[1:3]
    tile_width = max(MIN_TILE_WIDTH, min(width, SHEET_WIDTH // columns))
    tile = (tile_width, max(1, round(height * tile_width / width)))
    rows = -(-len(picked) // columns)
    canvas = Image.new("RGB", (columns * tile[0], rows * tile[1]))
    for index, frame in enumerate(picked):
        small = Image.fromarray(np.ascontiguousarray(frame)).resize(tile, Image.Resampling.BICUBIC)
        canvas.paste(small, (index % columns * tile[0], index // columns * tile[1]))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

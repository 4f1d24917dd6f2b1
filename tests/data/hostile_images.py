"""Hostile and odd images, by name, and what decoding each of them costs: `python hostile_images.py` prints JSON lines.

REFUSED must give a BadImage, DECODED an image, EITHER one of the two. Each is made when it is asked for.
"""

import ctypes
import functools
import io
import itertools
import json
import pickle
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, TiffImagePlugin

SOS, EOI, SOI = b"\xff\xda", b"\xff\xd9", b"\xff\xd8"
NOISE = np.random.default_rng(0).bytes(6000)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def made(kind: str, width: int = 64, height: int = 48, mode: str = "RGB", **options) -> bytes:
    return encode(picture(width, height, mode), kind, **options)


def cut(kind: str, share: float, **options) -> bytes:
    data = made(kind, 200, 160, **options)
    return data[: int(len(data) * share)]


# --- PNG ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(*chunks: bytes, size=(64, 48), bits: int = 8, colour: int = 2, rows: bytes | None = None) -> bytes:
    """`chunks` come between the header and the pixels; `rows` are these, compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    if rows is None:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = zlib.compress((b"\0" + bytes(-(-size[0] * channels * bits // 8))) * size[1], 9)
    pixels = chunk(b"IDAT", rows)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def zipped_zeros(mebibytes: int) -> bytes:
    """About a thousandth of what it inflates to."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


def apng(frames: int) -> bytes:
    control = struct.pack(">IIIIIHHBB", 0, 64, 48, 0, 0, 1, 1, 0, 0)
    return png(chunk(b"acTL", struct.pack(">II", frames, 0)), chunk(b"fcTL", control))


# --- JPEG -----------------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes, **options) -> bytes:
    """A good JPEG with segments right after its start."""
    return SOI + b"".join(segments) + made("JPEG", **options)[2:]


def changed_frame(change: Callable[[bytearray, int], None], **options) -> bytes:
    """A good JPEG after `change(data, place of SOF0 or SOF2)`: +2 length, +4 precision, +5 height, +7 width."""
    data = bytearray(made("JPEG", **options))
    change(data, data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0"))
    return bytes(data)


def sized(height: int, width: int, **options) -> bytes:
    return changed_frame(
        lambda d, at: d.__setitem__(slice(at + 5, at + 9), struct.pack(">HH", height, width)), **options
    )


def set_frame(offset: int, value: int) -> bytes:
    return changed_frame(lambda d, at: d.__setitem__(at + offset, value))


def without(marker: bytes) -> bytes:
    data = made("JPEG")
    while (at := data.find(marker)) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return data


def scans(count: int, side: int) -> bytes:
    """A progressive grey JPEG of a hundred bytes a scan: each passes over all blocks, and refines nothing."""
    quantisation = segment(0xDB, b"\0" + b"\1" * 64)
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    # One code, `0`: a run of 2^14 blocks and more without coefficients (EOB14), then 14 bits that say how many more.
    table = segment(0xC4, b"\x10" + b"\1" + bytes(15) + b"\xe0")
    dc_table = segment(0xC4, b"\0" + b"\1" + bytes(15) + b"\0")
    blocks = (side // 8) ** 2
    dc_scan = segment(0xDA, b"\1\1\0\0\0\1") + bytes(-(-blocks // 8))
    runs = -(-blocks // (2**15 - 1))
    bits = ("0" + "1" * 14) * runs
    body = (
        int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big").replace(b"\xff", b"\xff\0")
    )
    ac_scan = segment(0xDA, b"\1\1\0\1\x3f\0") + body
    return SOI + quantisation + frame + dc_table + dc_scan + table + ac_scan * count + EOI


def exif_loop() -> bytes:
    """A directory whose next directory is itself, and an entry that says it has 2^32 - 1 values."""
    entry = struct.pack(">HHII", 0x010E, 2, 2**32 - 1, 8)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 8)


# --- GIF, WEBP, BMP -------------------------------------------------------------------------------------------------


def gif(screen=(64, 48), frame=(0, 0, 64, 48), before: bytes = b"", code_size: int = 7, pixels: bytes | None = None):
    """Codes of 8 bits (128: start anew, 129: end) make it readable: every pixel is a byte."""
    pixels = (b"\x80" + bytes(100)) * 31 + b"\x81" if pixels is None else pixels
    blocks = [pixels[i : i + 255] for i in range(0, len(pixels), 255)]
    data = b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    start = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x86, 0, 0) + bytes(range(128)) * 3
    return start + before + b"," + struct.pack("<HHHHB", *frame, 0) + bytes([code_size]) + data + b";"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def vp8x(side: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + struct.pack("<I", side - 1)[:3] * 2


def vp8(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8 ", b"\x50\x40\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + NOISE[:1200]


def vp8l(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + NOISE[:1200]


def bmp(
    width=64, height=48, bits=24, compression=0, colours=0, offset=54, header=40, data: bytes | None = None
) -> bytes:
    data = bytes((width * 3 + 3) // 4 * 4 * abs(height)) if data is None else data
    info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, offset) + info + data


def multi_picture() -> bytes:
    return encode(picture(), "MPO", save_all=True, append_images=[picture()])


def loud_tiff() -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "x" * 1000
    return made("TIFF", tiffinfo=tags)


def zip_file() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(1 << 20))
    return data.getvalue()


REFUSED: dict[str, Callable[[], bytes]] = {
    # Larger than they look
    "png of 144 megapixels, all there": partial(png, size=(12_000, 12_000), bits=1, colour=0),
    "png of 3600 megapixels": partial(png, size=(60_000, 60_000), rows=zlib.compress(bytes(1000))),
    "png of 2^62 pixels": partial(png, size=(2**31 - 1, 2**31 - 1), rows=zlib.compress(bytes(1000))),
    "gif of 4 gigapixels": partial(gif, (65535, 65535), (0, 0, 65535, 65535)),
    "gif whose frame is larger than its screen": partial(gif, (64, 48), (0, 0, 60_000, 60_000)),
    "gif whose frame is far off its screen": partial(gif, (64, 48), (65_000, 65_000, 64, 48)),
    "webp canvas of 268 megapixels": lambda: webp(vp8x(16_383), vp8(64, 48)),
    "webp animation of 2^44 pixels": lambda: webp(vp8x(2**22, 2), (b"ANIM", bytes(6)), (b"ANMF", bytes(16))),
    "lossy webp of 268 megapixels": lambda: webp(vp8(16_383, 16_383)),
    "lossless webp of 268 megapixels": lambda: webp(vp8l(16_383, 16_383)),
    "bmp of 900 megapixels": partial(bmp, 30_000, 30_000, data=bytes(100)),
    "bmp of 900 megapixels in runs": partial(bmp, 30_000, 30_000, 8, 1, data=b"\xff\0" * 500),
    "bmp of 2^62 pixels": partial(bmp, 2**31 - 1, 2**31 - 1, data=bytes(100)),
    "jpeg of 4 gigapixels": partial(sized, 65_500, 65_500),
    "progressive jpeg of 4 gigapixels": partial(sized, 65_500, 65_500, progressive=True),
    # Slower than they look
    "jpeg of 2000 scans": partial(scans, 2000, 512),
    "jpeg of 49 megapixels and 500 scans": partial(scans, 500, 7000),
    "bmp of runs that never end": partial(bmp, bits=8, compression=1, data=bytes(1024) + b"\0\0" * 500_000),
    "bmp of 49 megapixels in runs": lambda: bmp(
        7000, 7000, 8, 1, 256, 54 + 1024, data=bytes(1024) + (b"\xff\0" * 27 + b"\x73\0\0\0") * 7000 + b"\0\1"
    ),
    "png with a thousand texts of 1 MB": lambda: png(chunk(b"zTXt", b"x\0\0" + zipped_zeros(1)) * 1000),
    # Shapes that no transform wants
    "jpeg of 65535 x 1": partial(sized, 1, 65_535),
    "jpeg of 500 x 40": partial(made, "JPEG", 500, 40),
    "jpeg without height (DNL)": partial(sized, 0, 64),
    "jpeg without width": partial(sized, 48, 0),
    "png without width": partial(png, size=(0, 48), rows=b""),
    "gif without size": partial(gif, (0, 0), (0, 0, 0, 0)),
    "bmp without width": partial(bmp, 0, 48, data=bytes(100)),
    "bmp of negative width": partial(bmp, -64, 48, data=bytes(64 * 48 * 3)),
    "webp of one pixel": partial(made, "WEBP", 1, 1),
    # Other formats, as they come named .jpg
    "eps": lambda: EPS,
    "eps with a dos header": lambda: (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 32, len(EPS), 0, 0, 0, 0, 65535) + EPS
    ),
    "postscript": lambda: EPS.replace(b" EPSF-3.0", b""),
    "pdf": partial(made, "PDF"),
    "svg": lambda: (
        b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'><image href='file:///etc/passwd'/></svg>"
    ),
    "html": lambda: b"<!DOCTYPE html><title>404</title>" * 20,
    "tiff": loud_tiff,
    "ico": partial(made, "ICO"),
    "icns": partial(made, "ICNS", 64, 64),
    "psd": lambda: b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 48, 64, 8, 3) + bytes(12) + bytes(64 * 48 * 3),
    "ppm": partial(made, "PPM"),
    "tga": partial(made, "TGA"),
    "pcx": partial(made, "PCX"),
    "xbm": partial(made, "XBM", mode="1"),
    "dds": partial(made, "DDS"),
    "sgi": partial(made, "SGI"),
    "jpeg 2000": partial(made, "JPEG2000"),
    "avif": lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + NOISE,
    "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + NOISE,
    "wmf": lambda: b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\1\0\x09\0" + NOISE,
    "zip": zip_file,
    "gzip": lambda: b"\x1f\x8b\x08" + NOISE,
    "elf": lambda: b"\x7fELF\2\1\1" + NOISE,
    "pickle": lambda: pickle.dumps(list(range(1000))),
    "noise": lambda: NOISE,
    "text": lambda: b"not found\n",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(100_000),
    "over 32 MiB": lambda: made("JPEG") + bytes(32 << 20),
    # Nothing after the first bytes
    **{
        f"only the start of a {name}": partial(bytes, start)
        for name, start in {
            "jpeg": b"\xff\xd8\xff",
            "png": b"\x89PNG\r\n\x1a\n",
            "gif": b"GIF89a",
            "webp": b"RIFF\x10\0\0\0WEBP",
            "bmp": b"BM",
        }.items()
    },
    "jpeg start, then noise": lambda: b"\xff\xd8\xff\xe0" + NOISE,
    "gif start, then postscript": lambda: b"GIF89a" + EPS,
    "bmp start, then postscript": lambda: b"BM" + EPS,
    # Cut off or damaged
    **{f"jpeg cut at {share:.0%}": partial(cut, "JPEG", share) for share in (0.3, 0.5, 0.7, 0.9)},
    **{f"progressive jpeg cut at {s:.0%}": partial(cut, "JPEG", s, progressive=True) for s in (0.3, 0.6, 0.9)},
    **{f"png cut at {share:.0%}": partial(cut, "PNG", share) for share in (0.1, 0.5, 0.9)},
    **{f"gif cut at {share:.0%}": partial(cut, "GIF", share) for share in (0.3, 0.9)},
    **{f"webp cut at {share:.0%}": partial(cut, "WEBP", share) for share in (0.3, 0.9)},
    **{f"bmp cut at {share:.0%}": partial(cut, "BMP", share) for share in (0.1, 0.9)},
    "png with a wrong header crc": lambda: made("PNG")[:29] + b"\0\0\0\0" + made("PNG")[33:],
    "png without pixels": lambda: png(rows=b""),
    "png with other pixels than zlib": lambda: png(rows=NOISE),
    "png with few rows": lambda: png(rows=zlib.compress(bytes(500))),
    "png of 3 bits": partial(png, bits=3),
    "png of colour type 5": lambda: png(colour=2).replace(b"\x08\x02\0\0\0", b"\x08\x05\0\0\0"),
    "gif without a frame": lambda: gif()[: 13 + 384] + b";",
    "gif with codes of 255 bits": partial(gif, code_size=255),
    "webp of noise": lambda: webp(vp8(64, 48)),
    "lossless webp of noise": lambda: webp(vp8l(64, 48)),
    "webp of unknown chunks": lambda: webp((b"abcd", NOISE)),
    "webp that says it has 4 GB": lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + NOISE,
    "bmp of 5 bits": partial(bmp, bits=5),
    "bmp of compression 77": partial(bmp, compression=77),
    "bmp with its pixels beyond the file": partial(bmp, offset=2**31),
    "bmp with a header of 2 GB": partial(bmp, header=2**31),
    "bmp with 2^32 - 1 colours": partial(bmp, bits=8, colours=2**32 - 1),
    "jpeg of 12 bits": partial(set_frame, 4, 12),
    "jpeg of 255 components": partial(set_frame, 9, 255),
    "jpeg with a frame twice": lambda: jpeg_with(made("JPEG")[made("JPEG").index(b"\xff\xc0") :][:19]),
    "lossless jpeg (SOF3)": partial(set_frame, 1, 0xC3),
    "jpeg with sampling 0": partial(set_frame, 11, 0),
    "jpeg with sampling 15": partial(set_frame, 11, 0xFF),
    "jpeg without quantisation": partial(without, b"\xff\xdb"),
    "jpeg with a huffman table of 4096 codes": lambda: jpeg_with(segment(0xC4, b"\0" + b"\xff" * 16 + bytes(4080))),
    "jpeg with a segment that ends nowhere": lambda: SOI + b"\xff\xe1\xff\xff" + made("JPEG")[2:],
}

DECODED: dict[str, Callable[[], bytes]] = {
    "jpeg with a megabyte after its end": lambda: made("JPEG") + NOISE * 180,
    "jpeg with a zip after its end": lambda: made("JPEG") + zip_file(),
    "jpeg with code in a comment": lambda: jpeg_with(segment(0xFE, b"<?php system('id'); ?>")),
    "jpeg with postscript in a comment": lambda: jpeg_with(segment(0xFE, EPS)),
    "jpeg with an exif that loops": lambda: jpeg_with(segment(0xE1, exif_loop())),
    "jpeg with a hundred comments of 64 KB": lambda: jpeg_with(segment(0xFE, b"x" * 65_533) * 100),
    "jpeg of cmyk": partial(made, "JPEG", mode="CMYK"),
    "grey jpeg": partial(made, "JPEG", mode="L"),
    "progressive jpeg": partial(made, "JPEG", progressive=True),
    "multi-picture jpeg": multi_picture,
    "png of 1 bit": partial(made, "PNG", mode="1"),
    "png of 16 bits": partial(png, bits=16, colour=2),
    "grey png of 16 bits with alpha": partial(png, bits=16, colour=4),
    "bmp upside down": partial(bmp, 64, -48),
    "gif with a thousand comments": lambda: gif(before=(b"!\xfe\xff" + b"c" * 255 + b"\0") * 1000),
}

EITHER: dict[str, Callable[[], bytes]] = {
    "png profile that inflates to 100 MB": lambda: png(chunk(b"iCCP", b"x\0\0" + zipped_zeros(100))),
    "png text that inflates to 100 MB": lambda: png(chunk(b"zTXt", b"x\0\0" + zipped_zeros(100))),
    "png international text that inflates to 100 MB": lambda: png(chunk(b"iTXt", b"x\0\1\0\0\0" + zipped_zeros(100))),
    "png pixels that inflate to 100 MB": lambda: png(rows=zipped_zeros(100)),
    "png with a text of 30 MB": lambda: png(chunk(b"tEXt", b"x\0" + bytes(30 << 20))),
    "png with wrong crc of its pixels": lambda: made("PNG")[:-16] + b"\0\0\0\0" + made("PNG")[-12:],
    "png without a palette": partial(png, colour=3),
    "png with indices beyond its palette": lambda: png(
        chunk(b"PLTE", bytes(6)), colour=3, rows=zlib.compress((b"\0" + b"\xff" * 64) * 48)
    ),
    "png with more transparency than colours": lambda: png(
        chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes(256)), colour=3
    ),
    "png with an exif that loops": lambda: png(chunk(b"eXIf", exif_loop()[6:])),
    "apng of 2^31 - 1 frames": partial(apng, 2**31 - 1),
    "apng of no frames": partial(apng, 0),
    "gif of garbage codes": partial(gif, pixels=NOISE),
    "gif of 3000 frames": lambda: gif()[:-1] + gif()[13 + 384 : -1] * 3000 + b";",
    "gif that loops for ever": lambda: gif(before=b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"),
    "gif with blocks that never end": partial(gif, pixels=bytes(5 << 20)),
    "webp of 300 frames": lambda: encode(
        picture(), "WEBP", save_all=True, append_images=[picture().rotate(i) for i in range(300)]
    ),
    "webp whose canvas is not its frame's": lambda: webp(vp8x(64), *[(b"VP8 ", made("WEBP")[20:])]),
    "webp with a broken exif": lambda: encode(picture(), "WEBP", exif=exif_loop()),
    "bmp runs that leave the picture": partial(bmp, bits=8, compression=1, data=bytes(1024) + b"\0\2\xff\xff" * 500),
    "jpeg without its end": lambda: made("JPEG")[:-2],
    "jpeg with arithmetic coding (SOF9)": partial(set_frame, 1, 0xC9),
    "jpeg without huffman tables": partial(without, b"\xff\xc4"),
    "jpeg with the wrong adobe transform": lambda: jpeg_with(segment(0xEE, b"Adobe\0\x64\0\0\0\0\xff")),
    "jpeg of ycck": lambda: made("JPEG", mode="CMYK").replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
    "jpeg with restarts out of order": lambda: jpeg_with(segment(0xDD, b"\0\1")),
    "jpeg of two components": partial(set_frame, 9, 2),
    "jpeg with noise for pixels": lambda: made("JPEG", 200, 160)[:700] + NOISE.replace(b"\xff", b"\0") + EOI,
    "jpeg with a hundred exifs of 64 KB": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + b"M" * 65_500) * 100),
    "jpeg with a profile in 255 parts": lambda: jpeg_with(
        *(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(65_000)) for i in range(1, 256))
    ),
    "jpeg with a broken list of pictures": lambda: jpeg_with(segment(0xE2, b"MPF\0" + exif_loop()[6:])),
    "jpeg with xmp of 6 MB": lambda: jpeg_with(
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<a>" * 20_000) * 100
    ),
}

# Near the limit of 50 megapixels, from a few kilobytes: they may be decoded, at a price that has to be known.
LARGEST: dict[str, Callable[[], bytes]] = {
    "png of 49 megapixels, grey": partial(png, size=(7000, 7000), bits=1, colour=0),
    "png of 49 megapixels with alpha": partial(png, size=(7000, 7000), colour=6),
    "png of 49 megapixels of 16 bits": partial(png, size=(7000, 7000), bits=16, colour=0),
    "gif of 49 megapixels": lambda: encode(Image.new("P", (7000, 7000)), "GIF"),
    "jpeg of 49 megapixels": lambda: encode(Image.new("RGB", (7000, 7000)), "JPEG", quality=20),
    "progressive jpeg of 49 megapixels": lambda: encode(
        Image.new("RGB", (7000, 7000)), "JPEG", quality=20, progressive=True
    ),
}


@functools.cache
def small(kind: str) -> dict[str, bytes]:
    """The images of "REFUSED", "DECODED" or "EITHER" that have under a MiB, made once."""
    made_of = {name: make() for name, make in globals()[kind].items()}
    return {name: data for name, data in made_of.items() if len(data) < 1 << 20}


def all_small() -> list[bytes]:
    """Those that must be refused come first."""
    return [data for kind in ("REFUSED", "DECODED", "EITHER") for data in small(kind).values()]


def measure(data: bytes, decode: Callable[[bytes], object]) -> dict:
    """What happens to one image: outcome, CPU milliseconds, and MB over the start. A crash ends the process.

    The outcome is `image WxH`, `BadImage: REASON`, or another error's name (a defect).
    """
    ctypes.CDLL(None).malloc_trim(0)  # or it finds room that costs nothing
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest memory so far is the present one
    before, begin = _highest_memory(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = _describe(decode(data))
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    spent = time.process_time() - begin
    return {"outcome": outcome, "ms": 1000 * spent, "mb": _highest_memory() - before}


def _highest_memory() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def main() -> None:
    from aimv2.data.images import decode_image
    from aimv2.data.transforms import TransformConfig, training_image, validation_image

    config = TransformConfig()
    ways = {
        "whole": decode_image,
        "draft": partial(decode_image, draft_size=config.image_size),
        "training": lambda data: training_image(data, config, np.random.default_rng(0)),
        "validation": lambda data: validation_image(data, config),
    }
    for kind, decode in itertools.product(("JPEG", "PNG", "WEBP", "GIF", "BMP"), ways.values()):
        decode(made(kind))  # imports and tables are not what is measured
    for kind in sys.argv[1:]:
        for name, make in globals()[kind].items():
            data = make()
            for way, decode in ways.items():
                print(json.dumps({"kind": kind, "name": name, "way": way} | measure(data, decode)), flush=True)


def _describe(image) -> str:
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    return f"image {width}x{height}"


if __name__ == "__main__":
    main()

"""A small made COYO-700M: its metadata in 128 parts, and the folder that img2dataset has downloaded of it so far.

`coyo-metadata/part-00000-...-c000.snappy.parquet` to part 127 have COYO's columns and types; the first six parts have
all but a few of the rows. `coyo/` holds what img2dataset 1.47 leaves for these six, file by file and field by field
(tests/data/test_coyo.py runs it and compares), in nine shards:

00000 00001 00003 00008   --skip_reencode: the bytes that were downloaded, also progressive, CMYK and turned JPEGs
00002                     missing: a gap in the numbers
00004 00005               --encode_format png and webp: resized to half
00006                     --disable_all_reencoding: PNG and WebP bytes are called jpg too, width and height are null
00007                     unfinished: the tar ends in the middle of a member, the parquet has no footer, and no stats

The images are shapes scenes. Everything is a function of the arguments.
"""

import hashlib
import io
import json
import math
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aimv2.data.shapes import captions, render, scene

PARTS = 128
COLUMNS = pa.schema(
    [
        ("id", pa.int64()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("image_phash", pa.string()),
        ("text_length", pa.int64()),
        ("word_count", pa.int64()),
        ("num_tokens_bert", pa.int64()),
        ("num_tokens_gpt", pa.int64()),
        ("num_faces", pa.int64()),
        ("clip_similarity_vitb32", pa.float64()),
        ("clip_similarity_vitl14", pa.float64()),
        ("nsfw_score_opennsfw2", pa.float64()),
        ("nsfw_score_gantman", pa.float64()),
        ("watermark_score", pa.float64()),
        ("aesthetic_score_laion_v2", pa.float64()),
    ]
)
# What the command in COYO's README saves: not the id.
SAVED = (
    "clip_similarity_vitb32",
    "clip_similarity_vitl14",
    "nsfw_score_opennsfw2",
    "nsfw_score_gantman",
    "watermark_score",
    "aesthetic_score_laion_v2",
)
SHARES = (0.34, 0.26, 0.2, 0.1, 0.066, 0.034)  # of the samples, in the first parts: 2, 2, 2, 1, 1 and 1 shards
GAP, PNG, WEBP, UNTOUCHED, UNFINISHED = 2, 4, 5, 6, 7

_UUID = "17da4908-939c-46e5-91d0-15f256041956"
_SIZES = ((320, 240), (256, 256), (240, 320), (400, 225), (300, 200), (224, 336), (288, 288))
_FAILURES = (
    ("failed_to_download", "HTTP Error 404: Not Found"),
    ("failed_to_download", "HTTP Error 403: Forbidden"),
    ("failed_to_download", "<urlopen error timed out>"),
    ("failed_to_resize", "Image decoding error"),
)
_WRITTEN = 1_660_000_000.25  # seconds; img2dataset's times have fractions, which make PAX headers


@dataclass(slots=True, kw_only=True)
class MadeCoyo:
    """Where it is, and what is in it."""

    metadata: Path
    images: Path
    rows: dict[int, dict] = field(default_factory=dict)  # id -> COYO's columns, of all parts
    shards: dict[str, list[int]] = field(default_factory=dict)  # finished shard -> ids of its samples, in tar order
    failed: dict[str, dict[int, tuple[str, str]]] = field(default_factory=dict)  # shard -> id -> status, message
    unfinished: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    same_image: list[tuple[int, int]] = field(default_factory=list)  # ids with one phash, the earlier first
    same_url: list[tuple[int, int]] = field(default_factory=list)  # ids with one url, the earlier first


def make_coyo(folder: Path, samples: int = 300, seed: int = 0, saved: tuple[str, ...] = SAVED) -> MadeCoyo:
    """Write `folder`/coyo-metadata and `folder`/coyo.

    Args:
        samples: rows of the six parts that were to be downloaded; about two thirds are.
        saved: img2dataset's --save_additional_columns.
    """
    if samples < 100:
        raise ValueError(f"samples is {samples}, expected at least 100 for every kind of shard to have some")
    made = MadeCoyo(metadata=folder / "coyo-metadata", images=folder / "coyo")
    made.metadata.mkdir(parents=True)
    (made.images / "_tmp").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pictures = _pictures(samples, rng)
    per_shard = math.ceil(0.17 * samples)
    shard = begin = 0
    for part in range(PARTS):
        sizes = [round(share * samples) for share in SHARES]
        count = sizes[part] if part < len(sizes) else 2
        rows = [_row(part, n, begin + n, pictures.get(begin + n), rng) for n in range(count)]
        _repeat_urls(made, rows)
        made.rows |= {row["id"]: row for row in rows}
        table = pa.Table.from_pylist(rows, COLUMNS)
        pq.write_table(table, made.metadata / f"part-{part:05d}-{_UUID}-c000.snappy.parquet", compression="snappy")
        if part < len(sizes):
            for first in range(0, count, per_shard):
                numbers = range(first, min(first + per_shard, count))
                order = [numbers[i] for i in _download_order(len(numbers), rng)]
                chosen = [(n - first, rows[n], pictures[begin + n]) for n in order]
                _download(made, shard, chosen, per_shard, saved)
                shard += 1
        begin += count
    by_hash: dict[str, int] = {}
    for row_id, row in made.rows.items():
        if (earlier := by_hash.setdefault(row["image_phash"], row_id)) != row_id:
            made.same_image.append((earlier, row_id))
    return made


def phash(image: Image.Image) -> str:
    """64 bits in hex: the signs of the low 8 x 8 of a 32 x 32 DCT around their median, as the package ImageHash."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    k = np.arange(8)[:, None]
    basis = np.cos(np.pi * k * (2 * np.arange(32) + 1) / 64)  # (8, 32)
    low = basis @ grey @ basis.T
    bits = (low > np.median(low)).flatten()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


@dataclass(slots=True)
class _Picture:
    image: Image.Image
    caption: str
    hash: str


def _pictures(samples: int, rng: np.random.Generator) -> dict[int, _Picture]:
    """Row number -> what its url shows. Every 25th shows what an earlier one does, in another size."""
    pictures: dict[int, _Picture] = {}
    seen: set[str] = set()
    index = 0
    for number in range(samples):
        size = _SIZES[rng.integers(len(_SIZES))]
        if number % 25 == 24:
            earlier = pictures[int(rng.integers(number // 2))]
            pictures[number] = _Picture(earlier.image.resize(size), earlier.caption, earlier.hash)
            continue
        while True:
            drawn = scene(0, "test", index, "full")
            image = render(drawn).resize(size, Image.Resampling.BICUBIC)
            index += 1
            if (code := phash(image)) not in seen:  # two lonely circles may look the same to it
                break
        seen.add(code)
        pictures[number] = _Picture(image, captions(drawn)[0], code)
    return pictures


def _row(part: int, n: int, number: int, picture: _Picture | None, rng: np.random.Generator) -> dict:
    text = _alt_text(number, picture.caption if picture else "a picture that nobody has asked for yet")
    width, height = picture.image.size if picture else (640, 480)
    words = len(text.split())
    return {
        "id": (part << 33) + n,  # as Spark's monotonically_increasing_id
        "url": f"https://shop-{number % 7}.example/images/{number:05d}.jpg?w={width}&h={height}",
        "text": text,
        "width": 2 * width,
        "height": 2 * height,
        "image_phash": picture.hash if picture else f"{int(rng.integers(2**63)):016x}",
        "text_length": len(text),
        "word_count": words,
        "num_tokens_bert": words + words // 4 + 2,
        "num_tokens_gpt": words + words // 5,
        "num_faces": int(rng.integers(3)),
        "clip_similarity_vitb32": float(rng.normal(0.29, 0.04)),
        "clip_similarity_vitl14": float(rng.normal(0.24, 0.05)),
        "nsfw_score_opennsfw2": float(rng.beta(0.5, 8)),
        "nsfw_score_gantman": float(rng.beta(0.5, 8)),
        "watermark_score": float(rng.beta(1, 3)),
        "aesthetic_score_laion_v2": float(rng.normal(4.9, 0.6)),
    }


def _alt_text(number: int, caption: str) -> str:
    if number == 11:
        return " ".join((caption.split() * 1500)[:1500])
    if number % 60 == 31:
        return "★★★★★"  # nothing to learn from
    kinds = (
        caption,
        f"Women&amp;#39;s {caption} &amp;amp; bags",
        f"{caption} - 무료 배송 🎉",
        f"<b>{caption}</b>\n\tfree   shipping",
        f"صورة {caption}\u200f",
        f"CafÃ© {caption} dâ€™art",
        f"Cafe\u0301 {caption}",
    )
    return kinds[number % len(kinds)]


def _repeat_urls(made: MadeCoyo, rows: list[dict]) -> None:
    """In every large part the 20th row has the url of the third, and another text."""
    if len(rows) >= 20:
        rows[19]["url"] = rows[2]["url"]
        made.same_url.append((rows[2]["id"], rows[19]["id"]))


def _download_order(count: int, rng: np.random.Generator) -> list[int]:
    """Threads finish out of order, but not by much."""
    return np.argsort(np.arange(count) + rng.uniform(0, 8, count)).tolist()


def _download(made: MadeCoyo, shard: int, chosen: list, per_shard: int, saved: tuple[str, ...]) -> None:
    """Write the files of one shard. `chosen`: (number in the shard, row, picture), in the order of completion."""
    name = f"{shard:05d}"
    if shard == GAP:
        made.missing.append(name)
        return
    path = made.images / f"{name}.tar"
    made.shards[name], made.failed[name], records = [], {}, []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, row, picture in chosen:
            digits = math.ceil(math.log10(per_shard))
            key = f"{10**digits * shard + number:0{digits + 5}d}"
            record = {column: row[column] for column in saved}
            record |= {"caption": row["text"], "url": row["url"], "key": key}
            if number % 8 == 5:
                status, message = _FAILURES[number // 8 % len(_FAILURES)]
                made.failed[name][row["id"]] = status, message
                records.append(record | _outcome(status, message))
                continue
            extension, data, size, downloaded = _encode(shard, number, picture)
            record |= _outcome("success", None, size, picture.image.size, downloaded)
            records.append(record)
            made.shards[name].append(row["id"])
            described = json.dumps(record, indent=4).encode()
            for suffix, content in ((extension, data), ("json", described), ("txt", row["text"].encode())):
                _add(tar, f"{key}.{suffix}", content)
    if shard == UNFINISHED:
        made.unfinished.append(name)
        del made.shards[name], made.failed[name]
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 // 512 * 512 + 700])
        (made.images / f"{name}.parquet").write_bytes(b"PAR1")
        (made.images / "_tmp" / f"{shard}.feather").write_bytes(b"ARROW1\0\0")
        return
    pq.write_table(pa.Table.from_pylist(records, _sidecar_schema(saved)), made.images / f"{name}.parquet")
    (made.images / f"{name}_stats.json").write_text(json.dumps(_stats(records), indent=4))


def _sidecar_schema(saved: tuple[str, ...]) -> pa.Schema:
    given = [(column, COLUMNS.field(column).type) for column in saved]
    texts = [(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")]
    sizes = [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    return pa.schema([*given, *texts, *sizes, ("exif", pa.string()), ("sha256", pa.string())])


def _outcome(status: str, message: str | None, size=(None, None), original=(None, None), data: bytes | None = None):
    """The fields that img2dataset adds. All sizes are unknown with --disable_all_reencoding."""
    return {
        "status": status,
        "error_message": message,
        "width": size[0],
        "height": size[1],
        "original_width": original[0] if size[0] else None,
        "original_height": original[1] if size[0] else None,
        "exif": None if data is None else json.dumps(_exif(data)),
        "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
    }


def _exif(data: bytes) -> dict[str, str]:
    return {"Image Orientation": "Rotated 90 CW"} if Image.open(io.BytesIO(data)).getexif() else {}


def _encode(shard: int, number: int, picture: _Picture) -> tuple[str, bytes, tuple, bytes]:
    """(extension, bytes, size as img2dataset says it, bytes that were downloaded)."""
    image = picture.image
    downloaded = _jpeg(image, number) if shard != UNTOUCHED else _bytes(image, ("JPEG", "PNG", "WEBP")[number % 3])
    if shard in (PNG, WEBP):
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        name = "png" if shard == PNG else "webp"
        return name, _bytes(small, name.upper()), small.size, downloaded
    if shard == UNTOUCHED:
        return "jpg", downloaded, (None, None), downloaded
    turned = number % 13 == 6
    return "jpg", downloaded, image.size[::-1] if turned else image.size, downloaded


def _jpeg(image: Image.Image, number: int) -> bytes:
    """A JPEG as the web has them."""
    if number % 13 == 6:  # lies on its side, EXIF says how to turn it
        exif = Image.Exif()
        exif[0x0112] = 6
        return _bytes(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    if number % 13 == 3:
        return _bytes(image.convert("CMYK"), "JPEG")
    if number % 13 == 9:
        return _bytes(image.convert("L"), "JPEG")
    return _bytes(image, "JPEG", progressive=number % 4 == 1)


def _bytes(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **({"quality": 85} if name != "PNG" else {"compress_level": 1}), **options)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member as webdataset's TarWriter makes it."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), _WRITTEN, 0o444
    member.uname = member.gname = "bigdata"
    tar.addfile(member, io.BytesIO(data))


def _stats(records: list[dict]) -> dict:
    """NNNNN_stats.json: the messages of what failed are counted, too."""
    outcomes = [r["error_message"] or "success" for r in records]
    statuses = [r["status"] for r in records]
    return {
        "count": len(records),
        "successes": statuses.count("success"),
        "failed_to_download": statuses.count("failed_to_download"),
        "failed_to_resize": statuses.count("failed_to_resize"),
        "duration": 12.5,
        "start_time": _WRITTEN,
        "end_time": _WRITTEN + 12.5,
        "status_dict": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
    }

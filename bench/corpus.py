"""Makes one text of many files, to train a model of bytes on, reads it, and makes files of it again.

    python bench/corpus.py linux-source-6.1/{Documentation,kernel,mm,fs} --suffixes .rst .c .h \\
        --exclude '*/translations/*' '*/nls/*' --bytes 64_000_000 --output corpus.xz
    python bench/corpus.py corpus.xz --unpack text          # text/00000.txt and so on, for lighthouse pretrain

The same folders give the same text: files are sorted by path, shuffled with a fixed seed, so that every stretch of the
text is of one kind with every other, and taken whole until there are enough bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import random
import sys
from fnmatch import fnmatch
from pathlib import Path

SEPARATOR = b"\n\0\n"  # between files; no text file has a zero byte
DICTIONARY = 1 << 27  # xz looks this far back: files of one folder lie anywhere in the shuffled text


def files(folders: list[Path], suffixes: list[str], exclude: list[str]) -> list[Path]:
    found = []
    for folder in folders:  # in the order given, so that it does not matter where they lie
        inside = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        found += sorted(path for path in inside if path.suffix in suffixes)
    return [path for path in found if not any(fnmatch(path.as_posix(), pattern) for pattern in exclude)]


def make(folders: list[Path], suffixes: list[str], exclude: list[str], enough: int) -> bytes:
    paths = files(folders, suffixes, exclude)
    random.Random(0).shuffle(paths)
    parts, size = [], 0
    for path in paths:
        part = path.read_bytes()
        if b"\0" in part or not part:
            continue
        parts.append(part)
        size += len(part) + len(SEPARATOR)
        if size >= enough:
            break
    else:
        sys.exit(f"{', '.join(map(str, folders))}: {len(parts):,} files with {size:,} bytes, {enough:,} are needed")
    print(f"{len(parts):,} of {len(paths):,} files, {size:,} bytes")
    return SEPARATOR.join(parts)


def read(path: Path) -> tuple[bytes, str]:
    """The text, and the sha256 of it."""
    text = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return text, hashlib.sha256(text).hexdigest()


def unpack(corpus: Path, folder: Path) -> None:
    """The text's files, numbered in its order, into a folder that is not there yet."""
    folder.mkdir(parents=True)
    parts = read(corpus)[0].split(SEPARATOR)
    for number, part in enumerate(parts):
        (folder / f"{number:05}.txt").write_bytes(part)
    print(f"{folder}: {len(parts):,} files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--suffixes", nargs="+", default=[".rst", ".md", ".txt", ".c", ".h", ".cpp", ".py"])
    parser.add_argument("--exclude", nargs="*", default=[], help="patterns of paths to leave out")
    parser.add_argument(
        "--bytes", type=int, default=64_000_000, help="stop when there are so many (default 64_000_000)"
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--output", type=Path, help="the text, xz-compressed")
    goal.add_argument("--unpack", type=Path, help="instead: a new folder for the files of the one text that is named")
    options = parser.parse_args()
    if options.unpack:
        if len(options.folders) != 1:
            parser.error("--unpack takes one text")
        return unpack(options.folders[0], options.unpack)
    text = make(options.folders, options.suffixes, options.exclude, options.bytes)
    print("compressing, about a minute", flush=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    packed = lzma.compress(text, check=lzma.CHECK_SHA256, filters=filters)
    options.output.write_bytes(packed)
    print(f"{options.output}: {len(packed):,} bytes, text sha256 {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main()

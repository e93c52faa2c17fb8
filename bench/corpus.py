"""Makes one text of many files, to train a model of bytes on, reads it, and makes files of it again.

    python bench/corpus.py linux-source-6.1/{Documentation,kernel,mm,fs} --suffixes .rst .c .h \\
        --exclude '*/translations/*' '*/nls/*' --bytes 64_000_000 --output corpus.xz
    python bench/corpus.py corpus.xz --unpack text          # text/00000.txt and so on, for lighthouse pretrain

The same folders give the same text: files are sorted by path, shuffled with a fixed seed, so that every stretch of the
text is of one kind with every other, and taken whole until there are enough bytes. With `--order path` they are left
sorted, so that the files of a folder stand together; `--held-out` takes whole folders, spread over the tree, out of
the text and into one of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import random
import sys
from fnmatch import fnmatch
from pathlib import Path

SEPARATOR = b"\n\0\n"  # between files; no text file has a zero byte
HELD_OUT_FOLDERS = 8
DICTIONARY = 1 << 27  # xz looks this far back: files of one folder lie anywhere in the shuffled text


def files(folders: list[Path], suffixes: list[str], exclude: list[str]) -> list[Path]:
    found = []
    for folder in folders:  # in the order given, wherever they are
        inside = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        found += sorted(path for path in inside if path.suffix in suffixes)
    return [path for path in found if not any(fnmatch(path.as_posix(), pattern) for pattern in exclude)]


def shuffled(parts: list) -> list:
    """The same parts in the order in which this file shuffles them, always the same."""
    parts = list(parts)
    random.Random(0).shuffle(parts)
    return parts


def held_out_folders(paths: list[Path], root: Path) -> set[Path]:
    """Eight folders with 64 to 160 KB of files of their own, chosen at random by their names alone."""
    sizes: dict[Path, int] = {}
    for path in paths:
        sizes[path.parent] = sizes.get(path.parent, 0) + path.stat().st_size
    fit = [folder for folder, size in sizes.items() if 64_000 <= size <= 160_000]
    by_chance = sorted(fit, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest())
    return set(by_chance[:HELD_OUT_FOLDERS])


def join(paths: list[Path], enough: int | None) -> bytes:
    parts, size = [], 0
    for path in paths:
        part = path.read_bytes()
        if b"\0" in part or not part:
            continue
        parts.append(part)
        size += len(part) + len(SEPARATOR)
        if enough and size >= enough:
            break
    else:
        if enough:
            sys.exit(f"{len(parts):,} files with {size:,} bytes, {enough:,} are needed")
    print(f"{len(parts):,} of {len(paths):,} files, {size:,} bytes")
    return SEPARATOR.join(parts)


def read(path: Path) -> tuple[bytes, str]:
    """The text, and the sha256 of it."""
    text = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return text, hashlib.sha256(text).hexdigest()


def unpack(corpus: Path, folder: Path) -> None:
    """The text's files, numbered in its order, into a folder that does not exist yet."""
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
    parser.add_argument("--bytes", type=int, help="stop at this many bytes (default 64_000_000, or all by path)")
    parser.add_argument("--order", choices=["shuffled", "path"], default="shuffled", help="of the files")
    parser.add_argument("--held-out", type=Path, help="take eight whole folders out of the text and write them there")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--output", type=Path, help="the text, xz-compressed")
    goal.add_argument("--unpack", type=Path, help="instead: a new folder for the files of the one text that is named")
    options = parser.parse_args()
    if options.unpack:
        if len(options.folders) != 1:
            parser.error("--unpack takes one text")
        return unpack(options.folders[0], options.unpack)
    paths = files(options.folders, options.suffixes, options.exclude)
    if options.held_out:
        root = Path(os.path.commonpath([folder.absolute() for folder in options.folders]))
        paths = [path.absolute() for path in paths]
        held_out = held_out_folders(paths, root)
        print("held out:", *sorted(folder.relative_to(root).as_posix() for folder in held_out))
        write(options.held_out, join([path for path in paths if path.parent in held_out], None))
        paths = [path for path in paths if path.parent not in held_out]
    if options.order == "shuffled":
        paths = shuffled(paths)
    enough = options.bytes or (64_000_000 if options.order == "shuffled" else None)
    print("compressing, some minutes", flush=True)
    write(options.output, join(paths, enough))


def write(path: Path, text: bytes) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    packed = lzma.compress(text, check=lzma.CHECK_SHA256, filters=filters)
    path.write_bytes(packed)
    print(f"{path}: {len(packed):,} bytes, text sha256 {hashlib.sha256(text).hexdigest()}", flush=True)


if __name__ == "__main__":
    main()

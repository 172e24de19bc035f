"""Text to memory-mapped tokens: the Pile, your own files, or the sources of Python's standard library.

    python prepare_pile.py                                               # the Pile from the hub -> data/pile
    python prepare_pile.py --source stdlib                               # this machine's Python -> data/stdlib
    python prepare_pile.py --source 'shards/*.jsonl.zst' --out_dir data/mine
    python prepare_pile.py --source notes/ book.txt --tokenizer bytes --out_dir data/notes

The source is a list of parts: a shard of the Pile, a piece of a large file, or a group of small files. Part 12 becomes
    train_012.bin    token ids, flat little-endian uint16; every document ends with <|endoftext|>
    val_012.bin      the documents held out, in the same form: those whose text has a small hash, whatever their order
With the last part, unfinished.json becomes meta.json (tokenizer, counts, source): a folder without it is not data.
Killed, the same command goes on with the first part that is missing. TokenData reads such a folder back, for training.
"""

import collections
import contextlib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
from tqdm import tqdm

from command import BadInput, Parser, run_command

PILE, PILE_TOKENS = "monology/pile-uncopyrighted", 31.5e9  # by GPT-2's tokenizer
PAPER_TOKENS = 60_000 * 512 * 1024  # what Table 8 trains on: steps * sequences * tokens
# What depends on the source: where it goes, how it is tokenized, how much is held out, and how much is enough.
SOURCES = {
    "pile": dict(out_dir="data/pile", tokenizer="gpt2", val_fraction=0.001, max_tokens=PAPER_TOKENS),
    "stdlib": dict(out_dir="data/stdlib", tokenizer="bytes", val_fraction=0.05, max_tokens=math.inf),
    "files": dict(out_dir="data/files", tokenizer="gpt2", val_fraction=0.05, max_tokens=math.inf),
}
VOCAB_SIZES = dict(gpt2=50257, bytes=257)  # with <|endoftext|>
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
PART_BYTES = 2**28  # of files in a part: about a minute of a core's work, which is what a kill can cost
TEXT_PIECE = 2**20  # plain text is cut at line ends into documents of about so many bytes: memory stays flat
BATCH_CHARS = 2**18  # text handed to a worker at a time


class Taken(BadInput):
    """The folder of data is there already, or another process is making it."""


def get_tokenizer(name):
    """A tiktoken.Encoding: "gpt2" (50257 tokens) or "bytes" (256 bytes and <|endoftext|>: 257). Raises BadInput."""
    if name == "bytes":
        ranks, special = {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=special)
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' connection errors are OSErrors
        raise BadInput(
            f"the gpt2 vocabulary is not in TIKTOKEN_CACHE_DIR={os.environ.get('TIKTOKEN_CACHE_DIR', '')} and it cannot "
            f"be downloaded ({type(error).__name__}): set that to a folder which tiktoken has filled on a machine that "
            "is online, or prepare the data with --tokenizer bytes"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# The source and its parts


def find_files(sources):
    """The files that --source means, each once: a list of paths, empty for the Pile. Raises BadInput."""
    if sources in (["pile"], ["stdlib"]):
        return standard_library_files() if sources == ["stdlib"] else []
    paths = {}
    for source in sources:
        found = []
        for path in [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True)):
            below = sorted(glob.glob(glob.escape(path) + "/**", recursive=True))  # all but hidden files
            found += filter(os.path.isfile, below if os.path.isdir(path) else [path])
        if not found:
            raise BadInput(f"--source {' '.join(sources)}: no file {source}; give files, folders or glob patterns, or "
                           "pile or stdlib alone")  # fmt: skip
        paths |= {os.path.realpath(path): path for path in found}
    return list(paths.values())


def standard_library_files():
    """The .py files of this Python's standard library, without its tests and what is installed: a list of paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [str(f) for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]


def cut_into_parts(paths):
    """Parts of about PART_BYTES: lists of pieces (path, start, stop), which are bytes of a file and end with a line."""
    pieces = []
    for path in paths:
        start, size = 0, os.path.getsize(path)
        if Path(path).suffix.lower() not in (*COMPRESSION, ".parquet"):
            with open(path, "rb") as file:
                while start + PART_BYTES < size:
                    file.seek(start + PART_BYTES)
                    file.readline()
                    pieces.append((path, start, file.tell()))
                    start = file.tell()
        pieces.append((path, start, size))
    return list(groups(pieces, PART_BYTES, size=lambda piece: piece[2] - piece[1]))


def groups(items, enough, size=len):
    """Consecutive items in lists, each ended by the item with which their sizes reach `enough`."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= enough:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextlib.contextmanager
def the_pile():
    """The Pile as a dataset streamed from the hub. Whatever goes wrong inside the block becomes BadInput."""
    import datasets  # takes a second

    try:
        yield datasets.load_dataset(PILE, split="train", streaming=True)
    except Exception as error:  # each library between here and the hub has its own
        raise BadInput(f"{PILE} cannot be read from the hub ({type(error).__name__}: {error}): mend the connection, or "
                       "give local shards by --source 'DIR/*.jsonl.zst'") from None  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Reading documents


class Bad(str):
    """Stands in its place for a document that cannot be read: where it is, and what is wrong with it."""


def read_part(part):
    """The documents of a part (a shard's number, or pieces of files) in order: strings, some of which may be Bad."""
    if isinstance(part, int):
        with the_pile() as dataset:
            for row in dataset.shard(num_shards=dataset.num_shards, index=part):
                yield row["text"]
        return
    for path, start, stop in part:
        name = path.lower().removesuffix(".gz").removesuffix(".zst")
        read = read_parquet if name.endswith(".parquet") else read_jsonl if name.endswith(".jsonl") else read_text
        try:
            yield from read(path, start, stop)
        except OSError as error:
            if error.errno:
                raise BadInput(f"{path}: cannot be read ({os.strerror(error.errno)})") from None
            yield Bad(f"{path}: damaged, cut short, or compressed by a zstd window over 2^27 bytes ({error})")
        except (pyarrow.ArrowException, KeyError) as error:
            yield Bad(f"{path}: not a parquet file with a column of texts ({error})")


def read_lines(path, start, stop):
    """The lines of a piece, or of a whole compressed file, as bytes: lists of about TEXT_PIECE together.

    Damage to a compressed file is an OSError without errno.
    """
    compression = COMPRESSION.get(Path(path).suffix.lower())
    if compression:
        if stop == 0:
            raise OSError("it is empty")  # which pyarrow would take for an empty text
        stop = math.inf
    with io.BufferedReader(pyarrow.input_stream(path, compression=compression), 2**20) as file:
        if start:
            file.seek(start)
        while start < stop and (lines := file.readlines(min(TEXT_PIECE, stop - start))):
            yield lines
            start += sum(map(len, lines))


def read_text(path, start, stop):
    for piece in map(b"".join, read_lines(path, start, stop)):
        try:
            yield piece.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Bad(f"{path}: not UTF-8 (byte 0x{piece[error.start]:02x} at offset {start + error.start})")
        start += len(piece)


def read_jsonl(path, start, stop):
    lines = itertools.chain.from_iterable(read_lines(path, start, stop))
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}" + (f" after byte {start}" if start else "")
        try:
            if line.strip():
                text = json.loads(line)["text"]
                yield text if isinstance(text, str) else Bad(f'{where}: "text" is no string')
        except (KeyError, TypeError):
            yield Bad(f'{where}: no "text" in it')
        except (ValueError, RecursionError) as error:
            yield Bad(f"{where}: not JSON in UTF-8 ({error})")


def read_parquet(path, start, stop):
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield text if isinstance(text, str) else Bad(f'{path}: {text!r} in the column "text" is no string')


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing and writing


def in_validation(text, val_fraction):
    """Whether a document (bytes) is held out: its hash, as a fraction of all hashes, is small enough."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def tokenize(text, tokenizer, val_fraction):
    """A text -> its tokens (uint16) with <|endoftext|> at the end, its length in bytes, and whether it is held out."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON's \ud83d can spell but UTF-8 cannot
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raw = text.encode("utf-8")
    # disallowed_special=(): a text that spells "<|endoftext|>" is text like any other
    tokens = np.append(tokenizer.encode_to_numpy(text, disallowed_special=()), tokenizer.eot_token)
    return tokens.astype("<u2"), len(raw), in_validation(raw, val_fraction)


def map_ahead(function, items, workers):
    """Like map(), computed ahead by threads, but not so far that memory grows with the items.

    Threads will do: tiktoken, which has nearly all of the work, runs outside the interpreter lock.
    """
    with ThreadPoolExecutor(workers) as executor:
        pending = collections.deque()
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def new_file(path):
    """A binary file to write. It takes the name `path` at the end, when it is whole and on the disk, or never."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_part(folder, part, meta, max_tokens, skip_bad, workers, bar):
    """Tokenize the part after those that meta counts, up to the document that reaches max_tokens; add it to meta."""
    tokenizer, number, began, n_tokens = get_tokenizer(meta["tokenizer"]), meta["parts"], time.monotonic(), 0

    def work(texts):
        return [text if isinstance(text, Bad) else tokenize(text, tokenizer, meta["val_fraction"]) for text in texts]

    batches = map_ahead(work, groups(read_part(part), BATCH_CHARS), workers)
    with new_file(folder / f"train_{number:03d}.bin") as train, new_file(folder / f"val_{number:03d}.bin") as val:
        for document in itertools.chain.from_iterable(batches):
            if isinstance(document, Bad):
                if not skip_bad:
                    raise BadInput(f"{document}; mend it, or go on without it by --skip_bad")
                meta["skipped_documents"] += 1
                continue
            tokens, n_bytes, held_out = document
            split, file = ("val", val) if held_out else ("train", train)
            file.write(tokens)
            meta[f"{split}_tokens"] += len(tokens)
            meta[f"{split}_documents"] += 1
            n_tokens += len(tokens)
            speed = n_tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{n_tokens / 1e6:.1f}M tokens, {speed / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(n_bytes)
            if meta["train_tokens"] >= max_tokens:
                break
    meta["parts"] += 1


def write_folder(folder, parts, meta, max_tokens, skip_bad, workers, bar):
    """Write the parts that are not there yet, and then meta.json; return it. Until then it is unfinished.json."""

    def save():
        with new_file(unfinished) as file:
            file.write(json.dumps(meta, indent=2).encode() + b"\n")

    unfinished, job = folder / "unfinished.json", meta["job"]
    if unfinished.exists():
        meta = json.loads(unfinished.read_text())
        bar.write(f"{folder}: {meta['parts']} of {len(parts)} parts are there, going on")
    if meta["job"] != job:
        raise BadInput(
            f"{folder} holds parts made by other flags or from other files: give those that it was started with "
            f"({unfinished.name} in it), or delete it"
        )
    folder.mkdir(exist_ok=True)
    save()
    while meta["parts"] < len(parts) and meta["train_tokens"] < max_tokens:
        write_part(folder, parts[meta["parts"]], meta, max_tokens, skip_bad, workers, bar)
        save()
    if not (meta["train_documents"] and meta["val_documents"]):
        shutil.rmtree(folder)
        raise BadInput(
            f"--source {' '.join(meta['source'])}: no document for one of the splits, as --val_fraction="
            f"{meta['val_fraction']} gives {meta['train_documents']} to training and {meta['val_documents']} to "
            f"validation ({meta['skipped_documents']} skipped as bad): give another, or more documents "
            "(`split -C 4k FILE` makes many of one)"
        )
    os.replace(unfinished, folder / "meta.json")
    return meta


def check_folder(folder, n_tokens):
    """Raise BadInput if the folder holds anything but an unfinished preparation, or the disk has no room for it."""
    there = {path.name for path in folder.iterdir()} - {"unfinished.json.tmp"} if folder.is_dir() else set()
    if there and "unfinished.json" not in there:
        kind = Taken if "meta.json" in there else BadInput
        raise kind(f"--out_dir={folder} exists already: delete it, or give another")
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = 2 * n_tokens, shutil.disk_usage(disk).free + sum(p.stat().st_size for p in folder.glob("*.bin"))
    if needed > free:
        raise BadInput(
            f"--out_dir={folder}: about {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free there: make "
            "room, give another, or a lower --max_tokens"
        )


def prepare(sources, out_dir=None, tokenizer=None, val_fraction=None, max_tokens=None, workers=None, skip_bad=False,
            quiet=False):  # fmt: skip
    """Tokenize `sources` (a list, as --source has it) into the folder out_dir and return its meta.json as a dict.

    What is None takes SOURCES' value for this kind of source, `workers` the number of cores. Raises BadInput; then
    out_dir holds the parts that were finished, with unfinished.json, or is not there.
    """
    kind = sources[0] if sources[0] in SOURCES else "files"
    default = SOURCES[kind]
    folder = Path(default["out_dir"] if out_dir is None else out_dir)
    tokenizer = default["tokenizer"] if tokenizer is None else tokenizer
    val_fraction = default["val_fraction"] if val_fraction is None else val_fraction
    max_tokens = default["max_tokens"] if max_tokens is None else max_tokens
    workers = (os.cpu_count() or 1) if workers is None else workers
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1, both excluded")
    if max_tokens < 1 or workers < 1:
        raise BadInput(f"--max_tokens={max_tokens} and --workers={workers} must be at least 1")
    get_tokenizer(tokenizer)  # what is wrong with it is said before anything is written
    paths = find_files(sources)
    n_tokens = PILE_TOKENS if kind == "pile" else sum(map(os.path.getsize, paths)) / 4.5  # at least, with GPT-2's
    lock = filelock.FileLock(f"{folder}.lock", timeout=0)
    try:
        check_folder(folder, min(max_tokens, n_tokens))
        if kind == "pile":
            with the_pile() as dataset:
                parts = list(range(dataset.num_shards))
        else:
            parts = cut_into_parts(paths)
        job = json.dumps([parts, tokenizer, val_fraction, max_tokens])  # all that decides on the bytes
        meta = dict(source=PILE if kind == "pile" else sources, tokenizer=tokenizer, vocab_size=VOCAB_SIZES[tokenizer], dtype="uint16",
                    val_fraction=val_fraction, job=hashlib.sha256(job.encode()).hexdigest(), parts=0, train_tokens=0,
                    val_tokens=0, train_documents=0, val_documents=0, skipped_documents=0)  # fmt: skip
        bar = tqdm(desc=str(folder), unit="B", unit_scale=True, disable=quiet, mininterval=0.5, delay=1)
        with lock, bar:
            try:
                check_folder(folder, 0)  # another process may just have made it
                meta = write_folder(folder, parts, meta, max_tokens, skip_bad or kind == "stdlib", workers, bar)
            finally:
                if not any(folder.glob("train_*.bin")):
                    shutil.rmtree(folder, ignore_errors=True)
                os.unlink(lock.lock_file)
    except filelock.Timeout:
        raise Taken(f"--out_dir={folder}: another process is preparing the same data: wait for it") from None
    except OSError as error:
        raise BadInput(f"--out_dir={folder} cannot be written ({error.strerror}): make room or give another") from None
    if not quiet:
        print(
            f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
            f"({meta['train_documents']:,} and {meta['val_documents']:,} documents, {meta['skipped_documents']:,} "
            "skipped as bad)"
        )
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Reading the tokens back, for training


def read_meta(data_dir, vocab_size):
    """meta.json of a data folder, checked against the model's vocabulary. Raises BadInput."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        tokenizer, n_vocab = meta["tokenizer"], meta["vocab_size"]
        if VOCAB_SIZES.get(tokenizer) != n_vocab or not isinstance(meta["train_tokens"] + meta["val_tokens"], int):
            raise ValueError(f"tokenizer {tokenizer!r} with vocab_size={n_vocab!r}, or a count that is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"--data_dir={data_dir}: {path} is missing or damaged ({type(error).__name__}: {error}): correct "
                       f"it, or `python prepare_pile.py --source FILES --out_dir {data_dir}`") from None  # fmt: skip
    if n_vocab > vocab_size:
        raise BadInput(f"{path}: tokenizer {tokenizer} has {n_vocab} tokens, the model only --vocab_size={vocab_size}: "
                       f"give --vocab_size={math.ceil(n_vocab / 64) * 64}, or other data")  # fmt: skip
    return meta


def permute(i, n, seed, epoch):
    """Where the positions i (int64 array, each below n) land in a pseudo-random permutation of range(n).

    A Feistel network mixes the two halves of a number's bits: a bijection of 2^bits numbers, whatever the mixing.
    Numbers that leave range(n) go through it again until they are back. An order over billions needs no memory so.
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = np.uint64(2**half - 1)
    keys = np.random.default_rng([seed, epoch]).integers(2**63, size=4, dtype=np.uint64)
    i = i.astype(np.uint64)
    outside = np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = i[outside] >> np.uint64(half), i[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's bits; overflow is welcome
            left, right = right, left ^ ((mixed ^ mixed >> np.uint64(32)) & mask)
        i[outside] = (left << np.uint64(half)) | right
        outside = i >= n
    return i.astype(np.int64)


class TokenData:
    """One split of a folder made by prepare_pile.py, as sequences of block_size + 1 tokens in memory-mapped files.

    Raises BadInput that names the file if one is missing, cut short, or holds token ids outside the vocabulary: the
    first CHECKED tokens of the split are checked at once, the others when they are read.
    """

    CHECKED = 2**24

    def __init__(self, data_dir, split, meta, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = sorted(Path(data_dir).glob(f"{split}*.bin"))  # val.bin, too, of earlier versions
        sizes, n_tokens = [path.stat().st_size for path in self.paths], meta[f"{split}_tokens"]
        odd = [path for path, size in zip(self.paths, sizes) if size % 2]
        first = [*odd, *self.paths, Path(data_dir) / f"{split}_000.bin"][0]
        if sum(sizes) != 2 * n_tokens:
            raise BadInput(f"{first}: the {split} split holds {sum(sizes) / 2:g} tokens where meta.json counts "
                           f"{n_tokens}: a file is missing, cut short or left over, copy the folder again")  # fmt: skip
        # Sequence s of a file is its tokens s * block_size ... (s + 1) * block_size: the last one is only a target.
        self.first_sequence = np.cumsum([0] + [max(0, size // 2 - 1) // block_size for size in sizes])
        if len(self) == 0:
            raise BadInput(f"{first}: {n_tokens} tokens are not one sequence of --block_size={block_size} and its "
                           "target: lower --block_size or prepare more text")  # fmt: skip
        unchecked = self.CHECKED
        for file, size in enumerate(sizes):
            if count := min(size // 2, unchecked):
                self.read(file, 0, count)
                unchecked -= count

    def __len__(self):
        return int(self.first_sequence[-1])

    def read(self, file, start, count):
        """Tokens start ... start + count - 1 of a file, checked.

        Mapped anew each time: a map that stays would count every page it ever touched as this process's memory, and
        end the process without a word where its file has shrunk.
        """
        path = self.paths[file]
        try:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=2 * start, shape=(count,))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} has vanished or shrunk ({error}): put it back as it was") from None
        if tokens.max() >= self.vocab_size:
            raise BadInput(f"{path} holds token id {tokens.max()}, but --vocab_size={self.vocab_size}: it is damaged, "
                           "or made by another tokenizer; give its own --vocab_size or prepare it again")  # fmt: skip
        return tokens

    def sequences(self, indices):
        """The sequences numbered `indices`, each with its next token: a (len(indices), block_size + 1) int64 array."""
        rows = []
        for index in indices:
            file = np.searchsorted(self.first_sequence, index, side="right") - 1
            start = (index - self.first_sequence[file]) * self.block_size
            rows.append(self.read(file, start, self.block_size + 1))
        return np.stack(rows).astype(np.int64)

    def in_order(self, first, count, seed):
        """The numbers of `count` training sequences from position `first` on: a new order for each epoch."""
        positions = np.arange(first, first + count)
        epochs = positions // len(self)
        parts = [permute(positions[epochs == e] % len(self), len(self), seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    parser, usual, pile = Parser(__doc__), SOURCES["files"], SOURCES["pile"]
    for flag, options in dict(
        source=dict(nargs="+", default=["pile"], metavar="S", help="pile, stdlib, or files, folders and quoted glob "
                    'patterns: .jsonl or .parquet with a "text" column, or plain text; also .gz and .zst'),
        out_dir=dict(help="folder to make (data/pile, data/stdlib or data/files)"),
        tokenizer=dict(choices=list(VOCAB_SIZES), help="(gpt2; bytes for stdlib)"),
        val_fraction=dict(type=float, help=f"share of documents held out ({usual['val_fraction']}; "
                                           f"{pile['val_fraction']} for the Pile)"),
        max_tokens=dict(type=int, help=f"training tokens to stop at ({pile['max_tokens']} for the Pile)"),
        workers=dict(type=int, help="threads that tokenize (all cores)"),
        skip_bad=dict(action="store_true", help="leave out and count bad lines and files"),
    ).items():  # fmt: skip
        parser.add_argument(f"--{flag}", **options)
    args = vars(parser.parse_args(argv))
    prepare(args.pop("source"), **args)


if __name__ == "__main__":
    run_command(main)

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
    if name != "gpt2":
        raise BadInput(f"tokenizer {name!r} is unknown: choose gpt2 or bytes")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' connection errors are OSErrors
        mend = "set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled elsewhere, or give --tokenizer bytes"
        raise BadInput(f"the gpt2 vocabulary cannot be downloaded ({type(error).__name__}): {mend}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The source and its parts


def find_parts(sources):
    """The parts of a source: numbers of the Pile's shards, or lists of pieces of files. Raises BadInput."""
    if len(sources) > 1 and {"pile", "stdlib"} & set(sources):
        raise BadInput(f"--source {' '.join(sources)}: pile and stdlib stand alone, not beside others")
    if sources == ["pile"]:
        with the_pile() as dataset:
            return list(range(dataset.num_shards))
    paths = standard_library_files() if sources == ["stdlib"] else [p for source in sources for p in expand(source)]
    pieces = []  # (path, start, stop): bytes of a file; only plain text is cut, at line ends
    for path in {os.path.realpath(path): path for path in paths}.values():  # each file once
        try:
            with open(path, "rb") as file:
                start, size = 0, file.seek(0, os.SEEK_END)
                while start + PART_BYTES < size and Path(path).suffix.lower() not in (*COMPRESSION, ".parquet"):
                    file.seek(start + PART_BYTES)
                    file.readline()
                    pieces.append((path, start, file.tell()))
                    start = file.tell()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        pieces.append((path, start, size))
    return list(groups(pieces, PART_BYTES, size=lambda piece: piece[2] - piece[1]))


def expand(source):
    """The files of a file, a folder (all below it but hidden ones) or a glob pattern: a sorted list of paths."""
    found = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
    patterns = [glob.escape(path) + ("/**" if os.path.isdir(path) else "") for path in found]
    files = {path for pattern in patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    if not files:
        raise BadInput(f"--source {source}: no file there: give files, folders, glob patterns, pile or stdlib")
    return sorted(files)


def standard_library_files():
    """The .py files of this Python's standard library, without its tests and what is installed: a list of paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [str(f) for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]


def groups(items, enough, size):
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
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{PILE} cannot be read from the hub ({reason}): give local shards by --source") from None


# ----------------------------------------------------------------------------------------------------------------------
# Reading documents


def read_part(part):
    """The documents of a part (a shard's number, or pieces of files), in order: strings, or BadInput for a bad one."""
    if isinstance(part, int):
        with the_pile() as dataset:
            for row in dataset.shard(num_shards=dataset.num_shards, index=part):
                yield (
                    row["text"]
                    if isinstance(row["text"], str)
                    else BadInput(f'{PILE}: a row whose "text" is no string')
                )
        return
    for path, start, stop in part:
        name = path.lower().removesuffix(".gz").removesuffix(".zst")
        read = read_parquet if name.endswith(".parquet") else read_jsonl if name.endswith(".jsonl") else read_text
        try:
            yield from read(path, start, stop)
        except (OSError, pyarrow.ArrowException, KeyError) as error:
            yield BadInput(f"{path}: damaged, of a zstd window over 2^27, or without a column of texts ({error})")


def read_lines(path, start, stop):
    """The lines of a piece, or of a whole compressed file, as bytes: lists of about TEXT_PIECE. Raises OSError."""
    compression = COMPRESSION.get(Path(path).suffix.lower())
    if compression and stop == 0:
        raise OSError("it is empty")  # which pyarrow would take for an empty text
    stop = math.inf if compression else stop
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
            yield BadInput(f"{path}: not UTF-8 (byte 0x{piece[error.start]:02x} at offset {start + error.start})")
        start += len(piece)


def read_jsonl(path, start, stop):
    for number, line in enumerate(itertools.chain.from_iterable(read_lines(path, start, stop)), start=1):
        where = f"{path} line {number}" + (f" after byte {start}" if start else "")
        try:
            if line.strip():
                text = json.loads(line)["text"]
                yield text if isinstance(text, str) else BadInput(f'{where}: "text" is no string')
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            yield BadInput(f'{where}: not JSON in UTF-8 with a "text" ({type(error).__name__}: {error})')


def read_parquet(path, start, stop):
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield text if isinstance(text, str) else BadInput(f'{path}: a {type(text)} in column "text"')


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing and writing


def tokenize(text, tokenizer, val_fraction):
    """A text -> tokens (uint16) that end with <|endoftext|>, length in bytes, and whether it is held out."""
    if isinstance(text, BadInput):
        return text  # write_part() decides on it, in order
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON's \ud83d can spell but UTF-8 cannot
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raw = text.encode("utf-8")
    # disallowed_special=(): a text that spells "<|endoftext|>" is text like any other
    tokens = np.append(tokenizer.encode_to_numpy(text, disallowed_special=()), tokenizer.eot_token)
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return tokens.astype("<u2"), len(raw), int.from_bytes(digest, "big") < val_fraction * 2**64


def tokenize_ahead(documents, tokenizer, val_fraction, workers):
    """What tokenize() makes of documents, in order, by threads that work ahead, but not so far that memory grows."""
    with ThreadPoolExecutor(workers) as executor:  # tiktoken has most of the work, and needs no interpreter lock
        pending = collections.deque()
        for texts in groups(documents, BATCH_CHARS, size=lambda text: len(str(text))):
            pending.append(executor.submit(lambda texts: [tokenize(t, tokenizer, val_fraction) for t in texts], texts))
            if len(pending) >= 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


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
    name = f"{meta['parts']:03d}.bin"
    documents = tokenize_ahead(read_part(part), get_tokenizer(meta["tokenizer"]), meta["val_fraction"], workers)
    with new_file(folder / f"train_{name}") as train, new_file(folder / f"val_{name}") as val:
        for document in documents:
            if isinstance(document, BadInput):
                if not skip_bad:
                    raise BadInput(f"{document}; mend it, or go on without it by --skip_bad")
                meta["skipped_documents"] += 1
                continue
            tokens, n_bytes, held_out = document
            split, file = ("val", val) if held_out else ("train", train)
            file.write(tokens)
            meta[f"{split}_tokens"] += len(tokens)
            meta[f"{split}_documents"] += 1
            if meta["train_tokens"] >= max_tokens:
                break
            bar.update(n_bytes)
    meta["parts"] += 1


def write_folder(folder, parts, at_least, meta, max_tokens, skip_bad, workers, bar):
    """Write the parts that are not there yet, and then meta.json; return it. Until then it is unfinished.json."""
    unfinished, job = folder / "unfinished.json", meta["job"]
    there = {path.name for path in folder.iterdir()} - {"unfinished.json.tmp"} if folder.is_dir() else set()
    if there and unfinished.name not in there:
        error = Taken if "meta.json" in there else BadInput
        raise error(f"--out_dir={folder} exists already: delete it, or give another")
    disk, done = folder if folder.exists() else folder.parent, sum(p.stat().st_size for p in folder.glob("*.bin"))
    free = shutil.disk_usage(disk).free + done
    if 2 * at_least > free:
        sizes = f"about {2 * at_least / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free there"
        raise BadInput(f"--out_dir={folder}: {sizes}: make room, give another, or a lower --max_tokens")
    if unfinished.exists():
        meta = json.loads(unfinished.read_text())
        bar.write(f"{folder}: {meta['parts']} of {len(parts)} parts are there, going on")
        if meta["job"] != job:
            raise BadInput(f"{folder} holds parts made by other flags or of other files: give those, or delete it")
    folder.mkdir(exist_ok=True)
    try:
        while True:
            with new_file(unfinished) as file:
                file.write(json.dumps(meta, indent=2).encode() + b"\n")
            if meta["parts"] == len(parts) or meta["train_tokens"] >= max_tokens:
                break
            write_part(folder, parts[meta["parts"]], meta, max_tokens, skip_bad, workers, bar)
        n_train, n_val, n_bad = (meta[f"{name}_documents"] for name in ("train", "val", "skipped"))
        if n_train == 0 or n_val == 0:
            meta["parts"] = 0  # they are of no use
            mend = "give another, or more documents (`split -C 4k FILE` makes many of one)"
            raise BadInput(f"--val_fraction={meta['val_fraction']} gives {n_train} documents to train and {n_val} to "
                           f"validate by ({n_bad} are skipped as bad), where each needs one: {mend}")  # fmt: skip
    finally:
        if meta["parts"] == 0:  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder / "meta.json")
    return meta


def prepare(sources, out_dir=None, tokenizer=None, val_fraction=None, max_tokens=None, workers=None, skip_bad=False,
            quiet=False):  # fmt: skip
    """Tokenize `sources` (a list, as --source has it) into the folder out_dir and return its meta.json as a dict.

    What is None takes SOURCES' value for this kind of source, `workers` the number of cores. Raises BadInput; then
    out_dir holds the finished parts and unfinished.json, or is not there.
    """
    kind = sources[0] if sources[0] in SOURCES else "files"
    given = dict(out_dir=out_dir, tokenizer=tokenizer, val_fraction=val_fraction, max_tokens=max_tokens)
    flags = SOURCES[kind] | {name: value for name, value in given.items() if value is not None}
    out_dir, tokenizer, val_fraction, max_tokens = flags.values()
    folder, workers = Path(out_dir), (os.cpu_count() or 1) if workers is None else workers
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1, both excluded")
    if max_tokens < 1 or workers < 1:
        raise BadInput(f"--max_tokens={max_tokens} and --workers={workers} must be at least 1")
    get_tokenizer(tokenizer)  # what is wrong with it is said before anything is written
    parts = find_parts(sources)
    at_least = PILE_TOKENS if kind == "pile" else sum(stop - start for part in parts for _, start, stop in part) / 4.5
    job = json.dumps([parts, tokenizer, val_fraction, max_tokens])  # all that decides on the bytes
    meta = dict(source=PILE if kind == "pile" else sources, tokenizer=tokenizer, vocab_size=VOCAB_SIZES[tokenizer],
                dtype="uint16", val_fraction=val_fraction, job=hashlib.sha256(job.encode()).hexdigest(), parts=0,
                train_tokens=0, val_tokens=0, train_documents=0, val_documents=0, skipped_documents=0)  # fmt: skip
    bar = tqdm(desc=str(folder), unit="B", unit_scale=True, disable=quiet, mininterval=0.5, delay=1)
    try:
        with filelock.FileLock(f"{folder}.lock", timeout=0) as lock, bar:  # this makes the folder above, too
            try:
                skip_bad = skip_bad or kind == "stdlib"  # what this machine's Python holds is no fault of the user
                meta = write_folder(folder, parts, min(max_tokens, at_least), meta, max_tokens, skip_bad, workers, bar)
            finally:
                with contextlib.suppress(OSError):  # Windows does so by itself, later
                    os.unlink(lock.lock_file)
    except filelock.Timeout:
        raise Taken(f"--out_dir={folder}: another process is preparing the same data: wait for it") from None
    except OSError as error:
        raise BadInput(f"--out_dir={folder} cannot be written ({error.strerror}): make room or give another") from None
    if not quiet:
        print(f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
              f"({meta['skipped_documents']:,} documents skipped as bad)")  # fmt: skip
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Reading the tokens back, for training


def read_meta(data_dir, vocab_size):
    """meta.json of a data folder, checked against the model's vocabulary. Raises BadInput."""
    path = Path(data_dir) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        tokenizer, n_vocab, counts = meta["tokenizer"], meta["vocab_size"], (meta["train_tokens"], meta["val_tokens"])
        if VOCAB_SIZES.get(tokenizer) != n_vocab or not all(isinstance(count, int) for count in counts):
            raise ValueError(f"tokenizer={tokenizer!r}, vocab_size={n_vocab!r}, tokens={counts}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{path} is missing or damaged ({type(error).__name__}: {error})"
        raise BadInput(f"--data_dir={data_dir}: {reason}: correct it, or make it by prepare_pile.py") from None
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
    i, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
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

    Raises BadInput that names the file if one is missing, cut short, or holds token ids outside the vocabulary.
    """

    CHECKED = 2**24  # tokens that are looked at when the split is opened; the others are when they are read

    def __init__(self, data_dir, split, meta, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = sorted(Path(data_dir).glob(f"{split}*.bin"))  # val.bin, too, of earlier versions
        sizes, n_tokens = [path.stat().st_size for path in self.paths], meta[f"{split}_tokens"]
        first = [*self.paths, Path(data_dir) / f"{split}_000.bin"][0]
        if sum(sizes) != 2 * n_tokens:
            raise BadInput(f"{first}: all {split} files have {sum(sizes)} bytes, where meta.json has {n_tokens} tokens "
                           "of 2: one is missing, cut short or left over, copy the folder again")  # fmt: skip
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
        """Tokens start ... start + count - 1 of a file, checked."""
        # Mapped anew each time: a map that stays would count every page it ever touched as this process's memory, and
        # end the process without a word where its file has shrunk.
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
        files = np.searchsorted(self.first_sequence, indices, side="right") - 1
        starts = (np.asarray(indices) - self.first_sequence[files]) * self.block_size
        return np.stack([self.read(f, s, self.block_size + 1) for f, s in zip(files, starts)]).astype(np.int64)

    def in_order(self, first, count, seed):
        """The numbers of `count` training sequences from position `first` on: a new order for each epoch."""
        positions = np.arange(first, first + count)
        epochs = positions // len(self)
        parts = [permute(positions[epochs == e] % len(self), len(self), seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    parser = Parser(__doc__)
    flag, usual = parser.add_argument, SOURCES["files"]
    flag("--source", nargs="+", default=["pile"], metavar="S", help="pile, stdlib, or files, folders, quoted patterns: "
         '.jsonl and .parquet (with a "text" column) or plain text, also .gz and .zst')  # fmt: skip
    flag("--out_dir", help="folder to make (data/pile, data/stdlib or data/files)")
    flag("--tokenizer", choices=list(VOCAB_SIZES), help="(gpt2; bytes for stdlib)")
    flag("--val_fraction", type=float, help=f"share of documents held out ({usual['val_fraction']}; less for the Pile)")
    flag("--max_tokens", type=int, help=f"training tokens to stop at ({PAPER_TOKENS} for the Pile)")
    flag("--workers", type=int, help="threads that tokenize (all cores)")
    flag("--skip_bad", action="store_true", help="leave out and count bad lines and files")
    args = vars(parser.parse_args(argv))
    prepare(args.pop("source"), **args)


if __name__ == "__main__":
    run_command(main)

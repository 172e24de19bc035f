"""Text to memory-mapped tokens: the Pile, your own files, or the sources of Python's standard library.

    python prepare_pile.py                                               # the Pile from the hub -> data/pile
    python prepare_pile.py --source stdlib                               # this machine's Python -> data/stdlib
    python prepare_pile.py --source 'shards/*.jsonl.zst' --out_dir data/mine
    python prepare_pile.py --source notes/ book.txt --tokenizer bytes --out_dir data/notes

The source is a list of shards: those of the Pile, or files. Their documents, in order, fill parts; part 12 becomes
    train_012.bin    token ids, flat little-endian uint16; every document ends with <|endoftext|>
    val_012.bin      the documents held out, in the same form: those whose text has a small hash, whatever their order
With the last part, unfinished.json becomes meta.json (tokenizer, counts, source): a folder without it is not data.
Killed, the same command goes on with the first part that is missing. TokenData reads such a folder back, for training.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
from tqdm import tqdm

from command import BadInput, Parser, only_one, run_command

PILE = "monology/pile-uncopyrighted"
PAPER_TOKENS = 60_000 * 512 * 1024  # what Table 8 trains on: steps * sequences * tokens
# What depends on the source: where it goes, how it is tokenized, how much is held out, and how much is enough. Plain
# text is cut at line ends into documents of about `piece` characters: one file can be split, and memory stays flat.
SOURCES = {
    "pile": dict(out_dir="data/pile", tokenizer="gpt2", val_fraction=0.001, max_tokens=PAPER_TOKENS, piece=2**12),
    "stdlib": dict(out_dir="data/stdlib", tokenizer="bytes", val_fraction=0.05, max_tokens=math.inf, piece=2**20),
    "files": dict(out_dir="data/files", tokenizer="gpt2", val_fraction=0.05, max_tokens=math.inf, piece=2**12),
}
VOCAB_SIZES = dict(gpt2=50257, bytes=257)  # with <|endoftext|>
PART_BYTES = 2**27  # of train_012.bin: about a minute of a core's work, which is what a kill can cost


class BadFile(BadInput):
    """The rest of a file cannot be read."""


class Taken(BadInput):
    """The folder of data is there already, or another process is making it."""


def get_tokenizer(name):
    """A tiktoken.Encoding: "gpt2" (50257 tokens) or "bytes" (256 bytes and <|endoftext|>: 257). Raises BadInput."""
    if name == "bytes":
        ranks, special = {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=special)
    if name not in VOCAB_SIZES:
        raise BadInput(f"tokenizer {name!r} is unknown: choose gpt2 or bytes")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' connection errors are OSErrors
        mend = "set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled elsewhere, or give --tokenizer bytes"
        raise BadInput(f"the gpt2 vocabulary cannot be downloaded ({type(error).__name__}): {mend}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The source: its shards and their documents


def find_shards(sources):
    """The shards of a source: numbers of the Pile's, or paths of files, each once. Raises BadInput."""
    if sources == ["pile"]:
        with the_pile() as dataset:
            return list(range(dataset.num_shards))
    if sources == ["stdlib"]:
        return standard_library_files()
    shards = {}
    for source in sources:
        found = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
        below = [path for folder in found for path in glob.glob(f"{glob.escape(folder)}/**", recursive=True)]
        files = [path for path in sorted(found + below) if os.path.isfile(path)]
        if not files:
            raise BadInput(f"--source {source}: no file there: give files, folders, patterns, or pile or stdlib alone")
        shards |= {os.path.realpath(path): path for path in files}
    return list(shards.values())


def standard_library_files():
    """The .py files of this Python's standard library, without its tests and what is installed: a list of paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [str(f) for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]


@contextlib.contextmanager
def the_pile():
    """The Pile as a dataset streamed from the hub. Whatever goes wrong inside the block becomes BadInput."""
    import datasets  # takes a second

    try:
        yield datasets.load_dataset(PILE, split="train", streaming=True)
    except Exception as error:  # each library between here and the hub has its own
        raise BadInput(f"{PILE} cannot be read from the hub ({error!r}): give local shards by --source") from None


def read_shards(shards, skip, piece):
    """The documents of shards, without the first `skip`, and None at each shard's end. A bad one is a BadInput."""
    for shard in shards:
        yield from itertools.islice(read_shard(shard, piece), skip, None)
        yield None
        skip = 0


def read_shard(shard, piece):
    if isinstance(shard, int):
        with the_pile() as dataset:
            for row in dataset.shard(num_shards=dataset.num_shards, index=shard):
                yield string(row["text"], PILE)
        return
    name = shard.lower().removesuffix(".gz").removesuffix(".zst")
    parquet, jsonl = name.endswith(".parquet"), name.endswith(".jsonl")
    try:
        yield from read_parquet(shard) if parquet else read_jsonl(shard) if jsonl else read_text(shard, piece)
    except Exception as error:  # damaged bytes fail in as many ways as there are libraries between
        if "requires too much memory" in str(error):
            raise BadInput(f"{shard}: its zstd window is longer than 2^27: compress it anew, without --long") from None
        yield BadFile(f"{shard}: unreadable, damaged, or without texts ({error})")


def open_bytes(path):
    """The file, uncompressed. Raises OSError."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    if compression and os.path.getsize(path) == 0:
        raise OSError("it is empty")  # which pyarrow would take for an empty text
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression), 2**20)


def read_text(path, piece):
    with io.TextIOWrapper(open_bytes(path), "utf-8-sig", "surrogateescape", newline="") as file:
        start = 0
        while text := file.read(piece) + file.readline(piece):  # to the line's end, if that is near
            bad = re.search("[\udc80-\udcff]", text)  # so a byte that is not UTF-8 has been read
            where = f"byte 0x{ord(bad[0]) - 0xDC00:02x} after {start + bad.start():,} characters" if bad else ""
            yield BadInput(f"{path}: not UTF-8 ({where})") if bad else text
            start += len(text)


def read_jsonl(path):
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                if line.strip():
                    yield string(json.loads(line)["text"], where)
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                yield BadInput(f'{where}: not JSON in UTF-8 with a "text" ({type(error).__name__}: {error})')


def read_parquet(path):
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=["text"]):
                    for value in batch.column("text"):
                        try:
                            yield string(value.as_py(), path)
                        except ValueError as error:  # not UTF-8
                            yield BadInput(f"{path}: a text in row group {group} ({error})")
            except (OSError, pyarrow.ArrowException) as error:  # a damaged page: the next row group may be whole
                yield BadFile(f"{path}: row group {group} ({error})")


def string(text, where):
    return text if isinstance(text, str) else BadInput(f'{where}: "text" is no string but {type(text)}')


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing and writing


def tokenize(text, tokenizer, val_fraction):
    """A text -> tokens (uint16), the last of them <|endoftext|>, length in bytes, and "val" or "train"; or BadInput."""
    if not isinstance(text, str):
        return text  # write_part() decides on it, in order
    # Half a surrogate pair, which JSON's \ud83d can spell but UTF-8 cannot, becomes a replacement character.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    raw = text.encode("utf-8")
    try:  # disallowed_special=(): a text that spells "<|endoftext|>" is text like any other
        tokens = np.append(tokenizer.encode_to_numpy(text, disallowed_special=()), tokenizer.eot_token)
    except ValueError as error:  # about a million spaces in a row are too many for tiktoken's regular expression
        return BadInput(f"a text of {len(text):,} characters that begins with {text[:40]!r}: {error}")
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
    return tokens.astype("<u2"), len(raw), "val" if number < val_fraction * 2**64 else "train"


def tokenize_ahead(documents, tokenizer, val_fraction, workers):
    """What tokenize() makes of documents, in order, by threads that work ahead, but not so far that memory grows."""
    with ThreadPoolExecutor(workers) as executor:  # tiktoken has most of the work, and needs no interpreter lock
        pending = []
        for document in documents:
            pending.append(executor.submit(tokenize, document, tokenizer, val_fraction))
            if len(pending) >= 16 * workers:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()


@contextlib.contextmanager
def new_file(path):
    """A binary file to write. It takes the name `path` at the end, when it is whole and on the disk, or never."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_part(folder, documents, meta, max_tokens, skip_bad, bar):
    """Write a part: documents until it has PART_BYTES, they end, or max_tokens are reached; count them in meta."""
    name = f"{meta['parts']:03d}.bin"
    with new_file(folder / f"train_{name}") as train, new_file(folder / f"val_{name}") as val:
        for document in documents:
            if document is None:
                meta["shards"], meta["shard_documents"] = meta["shards"] + 1, 0
                continue
            meta["shard_documents"] += 1
            if isinstance(document, BadInput):
                if not skip_bad:
                    raise BadInput(f"{document}; mend it, or go on without it by --skip_bad")
                meta["skipped_documents"] += 1
                if isinstance(document, BadFile):
                    bar.write(" ".join(str(document).split()) + ": its other documents are left out")
                continue
            tokens, n_bytes, split = document
            (val if split == "val" else train).write(tokens)
            meta[f"{split}_tokens"] += len(tokens)
            meta[f"{split}_documents"] += 1
            bar.update(n_bytes)
            if train.tell() >= PART_BYTES or meta["train_tokens"] >= max_tokens:
                break
    meta["parts"] += 1


def write_folder(folder, shards, at_least, meta, max_tokens, skip_bad, workers, bar):
    """Write the parts that are not there yet, counted in meta, and then meta.json. Until then it is unfinished.json."""
    unfinished = folder / "unfinished.json"
    there = {path.name: path.stat().st_size for path in folder.glob("*") if path.name != "unfinished.json.tmp"}
    if there and unfinished.name not in there:
        error = Taken if "meta.json" in there else BadInput
        raise error(f"--out_dir={folder} exists already: delete it, or give another")
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free + sum(there.values())
    if 2 * at_least > free:
        sizes = f"about {2 * at_least / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free there"
        raise BadInput(f"--out_dir={folder}: {sizes}: make room, give another, or a lower --max_tokens")
    if there:
        begun = json.loads(unfinished.read_text())
        if begun["job"] != meta["job"]:
            raise BadInput(f"{folder} holds parts made by other flags or of other files: give those, or delete it")
        bar.write(f"{folder}: {begun['parts']} part(s) are there, going on")
        meta.update(begun)
    folder.mkdir(exist_ok=True)
    texts = read_shards(shards[meta["shards"] :], meta["shard_documents"], meta["piece"])
    documents = tokenize_ahead(texts, get_tokenizer(meta["tokenizer"]), meta["val_fraction"], workers)
    try:
        while True:
            with new_file(unfinished) as file:
                file.write(json.dumps(meta, indent=2).encode() + b"\n")
            if meta["shards"] == len(shards) or meta["train_tokens"] >= max_tokens:
                break
            write_part(folder, documents, meta, max_tokens, skip_bad, bar)
        if meta["train_documents"] == 0 or meta["val_documents"] == 0:
            meta["parts"] = 0  # they are of no use
            found = "{train_documents} documents to train and {val_documents} to validate by ({skipped_documents} bad)"
            mend = "give another, or more documents"
            raise BadInput(f"--val_fraction={meta['val_fraction']} gives {found.format(**meta)}: {mend}")
    finally:
        if meta["parts"] == 0:  # nothing to go on from
            for path in [path for name in ("train_*.bin*", "val_*.bin*", "unfinished.*") for path in folder.glob(name)]:
                path.unlink()
            with contextlib.suppress(OSError):  # somebody else's file is in it
                folder.rmdir()
    os.replace(unfinished, folder / "meta.json")


def prepare(sources, out_dir=None, tokenizer=None, val_fraction=None, max_tokens=None, workers=None, skip_bad=False,
            quiet=False):  # fmt: skip
    """Tokenize `sources` (a list) into the folder out_dir; return its meta.json. What is None takes SOURCES' value."""
    kind = sources[0] if len(sources) == 1 and sources[0] in SOURCES else "files"
    given = dict(out_dir=out_dir, tokenizer=tokenizer, val_fraction=val_fraction, max_tokens=max_tokens)
    flags = SOURCES[kind] | {name: value for name, value in given.items() if value is not None}
    out_dir, tokenizer, val_fraction, max_tokens, piece = flags.values()  # in SOURCES' order
    folder, workers = Path(out_dir), (os.cpu_count() or 1) if workers is None else workers
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1, both excluded")
    if max_tokens < 1 or workers < 1:
        raise BadInput(f"--max_tokens={max_tokens} and --workers={workers} must be at least 1")
    vocab_size = get_tokenizer(tokenizer).n_vocab  # what is wrong with it is said before anything is written
    made = os.path.realpath(folder)  # what an unfinished preparation has left below a source is no source
    shards = [shard for shard in find_shards(sources)
              if not os.path.realpath(str(shard)).startswith((made + os.sep, made + ".lock"))]  # fmt: skip
    sizes = [4.5 * PAPER_TOKENS] if kind == "pile" else [os.path.getsize(path) for path in shards]
    at_least = min(max_tokens, sum(sizes) / 4.5)  # gpt2 has the longest tokens, of about 4.5 bytes
    decisive = json.dumps([shards, sizes, tokenizer, val_fraction, max_tokens, piece])  # for the bytes that are written
    meta = dict(source=PILE if kind == "pile" else sources, tokenizer=tokenizer, vocab_size=vocab_size, dtype="uint16",
                val_fraction=val_fraction, piece=piece, job=hashlib.sha256(decisive.encode()).hexdigest(), parts=0,
                shards=0, shard_documents=0,  # that are done, and of the next one so many documents
                train_tokens=0, val_tokens=0, train_documents=0, val_documents=0, skipped_documents=0)  # fmt: skip
    skip_bad = skip_bad or kind == "stdlib"  # what this machine's Python holds is no fault of the user
    bar = tqdm(desc=str(folder), unit="B", unit_scale=True, disable=quiet, mininterval=0.5, delay=1)
    try:
        taken = Taken(f"--out_dir={folder}: another process is preparing the same data: wait for it")
        with only_one(f"{folder}.lock", taken), bar:
            write_folder(folder, shards, at_least, meta, max_tokens, skip_bad, workers, bar)
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
        enough = math.ceil(n_vocab / 64) * 64
        raise BadInput(f"{path}: {n_vocab} tokens, but --vocab_size={vocab_size}: give {enough}, or other data")
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
    """One split of a data folder, as sequences of block_size + 1 tokens in memory-mapped files.

    Raises BadInput that names the file if one is missing, cut short, or holds token ids outside the vocabulary.
    """

    CHECKED = 1000  # sequences that are looked at when the split is opened; the others are when they are read

    def __init__(self, data_dir, split, meta, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = sorted(Path(data_dir).glob(f"{split}*.bin"))  # val.bin, too, of earlier versions
        sizes, n_tokens = [path.stat().st_size for path in self.paths], meta[f"{split}_tokens"]
        first = [*self.paths, Path(data_dir) / f"{split}_000.bin"][0]
        if sum(sizes) != 2 * n_tokens:
            raise BadInput(f"{first}: {split} files have {sum(sizes)} bytes, not {2 * n_tokens}: copy the folder again")
        # Sequence s of a file is its tokens s * block_size ... (s + 1) * block_size: the last one is only a target.
        self.first_sequence = np.cumsum([0] + [max(0, size // 2 - 1) // block_size for size in sizes])
        if len(self) == 0:
            raise BadInput(f"{first}: {n_tokens} tokens are no sequence of --block_size={block_size}: lower it")
        self.sequences(range(min(len(self), self.CHECKED)))

    def __len__(self):
        return int(self.first_sequence[-1])

    def sequence(self, number):
        """The tokens of one sequence and the next one, checked."""
        # Mapped anew each time: a map that stays would count every page it ever touched as this process's memory, and
        # end the process without a word where its file has shrunk.
        file = np.searchsorted(self.first_sequence, number, side="right") - 1
        path, start = self.paths[file], (number - self.first_sequence[file]) * self.block_size
        try:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=2 * start, shape=(self.block_size + 1,))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} has vanished or shrunk ({error}): put it back as it was") from None
        if tokens.max() >= self.vocab_size:
            what = f"token {tokens.max()}, but --vocab_size={self.vocab_size}"
            raise BadInput(f"{path} holds {what}: it is damaged, or of another tokenizer: prepare it again")
        return tokens

    def sequences(self, numbers):
        """The sequences of these numbers, each with its next token: a (len(numbers), block_size + 1) int64 array."""
        return np.stack([self.sequence(number) for number in numbers]).astype(np.int64)

    def in_order(self, first, count, seed):
        """The numbers of `count` training sequences from position `first` on: a new order for each epoch."""
        epochs, places = np.divmod(np.arange(first, first + count), len(self))
        orders = [permute(places[epochs == epoch], len(self), seed, int(epoch)) for epoch in np.unique(epochs)]
        return np.concatenate(orders)


def main(argv=None):
    parser = Parser(__doc__)
    flag, usual = parser.add_argument, SOURCES["files"]
    flag("--source", nargs="+", default=["pile"], dest="sources", metavar="S", help="pile, stdlib, or files, folders, "
         'quoted patterns: .jsonl and .parquet (with a "text" column) or plain text, also .gz and .zst')  # fmt: skip
    flag("--out_dir", help="folder to make (data/pile, data/stdlib or data/files)")
    flag("--tokenizer", choices=list(VOCAB_SIZES), help="(gpt2; bytes for stdlib)")
    flag("--val_fraction", type=float, help=f"share of documents held out ({usual['val_fraction']}; less for the Pile)")
    flag("--max_tokens", type=int, help=f"training tokens to stop at ({PAPER_TOKENS} for the Pile)")
    flag("--workers", type=int, help="threads that tokenize (all cores)")
    flag("--skip_bad", action="store_true", help="leave out and count bad lines and files")
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(main)

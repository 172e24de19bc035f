"""Text to memory-mapped tokens: the Pile, your own files, or the sources of Python's standard library.

    python prepare_pile.py                                               # the Pile from the hub -> data/pile
    python prepare_pile.py --source stdlib                               # this machine's Python -> data/stdlib
    python prepare_pile.py --source 'shards/*.jsonl.zst' --out_dir data/mine
    python prepare_pile.py --source notes/ book.txt --tokenizer bytes --out_dir data/notes

Several --workers take the shards of the source in parallel. Killed, the same command goes on: it loses the shards that
were in progress. What it writes into --out_dir, which appears whole, at the end, or not at all:
    train_000.bin, train_001.bin, ...   token ids, flat little-endian uint16; every document ends with <|endoftext|>
    val.bin                             the validation split, in the same form
    meta.json                           tokenizer, vocab_size, counts of tokens and documents, source

A document goes to validation if the hash of its text falls below --val_fraction, so the split depends neither on the
order of the documents nor on the number of workers; equal documents always fall on the same side. TokenData reads such
a folder back, as sequences for training.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import threading
import zlib
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

PILE = "monology/pile-uncopyrighted"
PILE_TOKENS = 31.5e9  # GPT-2 tokens in it
PAPER_TOKENS = 60_000 * 512 * 1024  # what Table 8 trains on: steps * sequences * tokens
# What depends on the source: where it goes, how it is tokenized, how much is held out, and how much is enough.
SOURCES = {
    "pile": dict(out_dir="data/pile", tokenizer="gpt2", val_fraction=0.001, max_tokens=PAPER_TOKENS),
    "stdlib": dict(out_dir="data/stdlib", tokenizer="bytes", val_fraction=0.05, max_tokens=None),
    "files": dict(out_dir="data/files", tokenizer="gpt2", val_fraction=0.05, max_tokens=None),
}
VOCAB_SIZES = dict(gpt2=50257, bytes=257)  # with <|endoftext|>
SHARD_TOKENS = 10**8  # 200 MB
UNIT_BYTES = 2**26  # small files are taken together until they have so many bytes
BATCH_CHARS = 2**20  # text handed to a worker at a time
TEXT_PIECE = 2**20  # a plain text file is cut at line ends into documents of about so many bytes: memory stays flat


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, one line each (train.py and sample.py use these too)


class BadInput(Exception):
    """Something the user can mend. The message names the flag or file, its value and the mend."""


class Taken(BadInput):
    """The folder of data is there already, or another process is making it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not guess at shortened flags and reports an error in one line."""

    def __init__(self, description, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def run_command(main, silent=lambda: False):
    """Run main(); bad input ends in one line on standard error (unless silent()) and status 2, Ctrl-C in status 130."""
    try:
        main()
    except BadInput as error:
        message = " ".join(str(error).split())  # one line, whatever a library put into it
        if not silent():
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """A tiktoken.Encoding: "gpt2" (50257 tokens) or "bytes" (256 bytes and <|endoftext|>: 257). Raises BadInput."""
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"[\s\S]+",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name not in VOCAB_SIZES:
        raise BadInput(f"tokenizer {name!r} is unknown: choose gpt2 or bytes")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # requests' connection errors are OSErrors
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "")
        raise BadInput(
            f"the gpt2 vocabulary is not in TIKTOKEN_CACHE_DIR={cache} and cannot be "
            f"downloaded ({type(error).__name__}): run `TIKTOKEN_CACHE_DIR=DIR python -c 'import tiktoken; "
            'tiktoken.get_encoding("gpt2")\'` on a machine that is online, copy DIR here and set TIKTOKEN_CACHE_DIR '
            "to it; or prepare the data with --tokenizer bytes"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Reading documents


class Reader:
    """Yields the documents of a source as strings, in order; counts the ones skipped as bad.

    A source consists of units(), which workers can read side by side: groups of files, or the Pile's shards.
    sources: "pile", "stdlib", or files, folders and glob patterns. Files ending in .jsonl, .jsonl.zst, .jsonl.gz and
    .parquet are shards with a "text" column; every other file is plain text.
    Raises BadInput that names the file (and line) of a bad document, unless skip_bad.
    """

    def __init__(self, sources, skip_bad=False):
        self.sources = sources
        self.skip_bad = skip_bad
        self.skipped = 0
        self.kind = sources[0] if sources[0] in ("pile", "stdlib") else "files"
        self.paths = []
        if len(sources) > 1 and set(sources) & {"pile", "stdlib"}:
            raise BadInput(f"--source {' '.join(sources)}: pile and stdlib stand alone, not beside others")
        if self.kind == "stdlib":
            self.skip_bad = True  # an old encoding in some corner of it is no fault of the user
            self.paths = standard_library_files()
        elif self.kind == "files":
            self.paths = list(dict.fromkeys(path for source in sources for path in expand(source)))  # each once

    def units(self):
        """The source in parts for read(), in order. They do not depend on how many workers there are."""
        if self.kind == "pile":
            return list(range(self.hub(PILE).num_shards))
        units, size = [], UNIT_BYTES
        for path in self.paths:
            if size >= UNIT_BYTES:
                units.append([])
                size = 0
            units[-1].append(path)
            with contextlib.suppress(OSError):  # read() will say so
                size += os.path.getsize(path)
        return units

    def __iter__(self):
        for unit in self.units():
            yield from self.read(unit)

    def read(self, unit):
        """The documents of one of the units()."""
        if self.kind == "pile":
            yield from self.read_hub(PILE, unit)
            return
        for path in unit:
            name = path.lower()
            try:
                if name.endswith((".jsonl", ".jsonl.zst", ".jsonl.gz")):
                    yield from self.read_jsonl(path)
                elif name.endswith(".parquet"):
                    yield from self.read_parquet(path)
                else:
                    yield from self.read_text(path)
            except OSError as error:
                raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None

    def bad(self, message):
        """Count a bad document under --skip_bad, else stop."""
        if not self.skip_bad:
            raise BadInput(f"{message}; mend it, or go on without it by --skip_bad")
        self.skipped += 1

    def read_text(self, path):
        with open(path, "rb") as file:
            offset = 0
            while lines := file.readlines(TEXT_PIECE):
                piece = b"".join(lines)
                try:
                    yield piece.decode("utf-8")
                except UnicodeDecodeError as error:
                    self.bad(f"{path}: not UTF-8 (byte 0x{piece[error.start]:02x} at offset {offset + error.start})")
                offset += len(piece)

    def read_jsonl(self, path):
        import zstandard

        number = 0
        try:
            with open(path, "rb") as raw:
                lines = raw
                if path.lower().endswith(".zst"):
                    lines = zstd_lines(raw)
                elif path.lower().endswith(".gz"):
                    lines = gzip.GzipFile(fileobj=raw)
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    try:
                        text = json.loads(line)["text"]
                        if not isinstance(text, str):
                            raise TypeError
                    except UnicodeDecodeError:
                        self.bad(f"{path} line {number}: not UTF-8")
                    except json.JSONDecodeError as error:
                        self.bad(f"{path} line {number}: not JSON ({error.msg} at column {error.colno})")
                    except RecursionError:
                        self.bad(f"{path} line {number}: nested too deeply")
                    except (KeyError, TypeError):
                        self.bad(f'{path} line {number}: no string "text" in it')
                    else:
                        yield text
        except (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            self.bad(f"{path} after line {number}: the compressed file is damaged ({error})")

    def read_parquet(self, path):
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if "text" not in file.schema_arrow.names:
                    raise pyarrow.ArrowInvalid(f'no column "text" among {file.schema_arrow.names}')
                row = 0
                for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                    for text in batch.column("text").to_pylist():
                        row += 1
                        if isinstance(text, str):
                            yield text
                        else:
                            self.bad(f'{path} row {row}: no string "text" in it')
        except pyarrow.ArrowException as error:
            self.bad(f"{path}: not a parquet shard of texts ({error})")

    def hub(self, name):
        import datasets

        try:
            return datasets.load_dataset(name, split="train", streaming=True)
        except OSError as error:
            raise self.no_hub(name, error) from None

    def read_hub(self, name, shard):
        dataset = self.hub(name)
        try:
            for row in dataset.shard(num_shards=dataset.num_shards, index=shard):
                yield row["text"]
        except OSError as error:
            raise self.no_hub(name, error) from None

    def no_hub(self, name, error):
        return BadInput(
            f"{name} cannot be read from the hub ({error}): mend the connection, or give local shards by "
            "--source 'DIR/*.jsonl.zst'"
        )


def zstd_lines(raw):
    """The lines in a file of zstandard frames. Raises EOFError if the last frame is cut short.

    (zstandard's own stream_reader takes a file cut short for one that ends there.)
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame, rest = None, b""
    while data := raw.read(2**20):
        while data:
            frame = frame or decompressor.decompressobj()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")
    if rest:
        yield rest


def standard_library_files():
    """The .py files of this Python's standard library, sorted: a list of paths.

    Neither what is installed into it nor its own tests, which many distributions leave out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [str(f) for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]
    if not files:
        raise BadInput(f"--source stdlib: {root} holds no .py files; give text of your own by --source")
    return files


def expand(pattern):
    """A file, a folder (every file below it but hidden ones) or a glob pattern (** for any depth): a list of paths."""
    paths = []
    for path in sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else []):
        if os.path.isdir(path):
            below = (p for p in sorted(Path(path).rglob("*")) if p.is_file())
            paths += [str(p) for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            paths.append(path)
    if not paths:
        raise BadInput(f"--source {pattern}: no files there; give a file, a folder, a glob pattern, pile or stdlib")
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing and writing


def in_validation(text, val_fraction):
    """Whether a document belongs to the validation split: its hash, as a fraction of all hashes, is small enough."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def tokenize(texts, tokenizer, val_fraction):
    """A list of texts -> a list of (tokens uint16 with <|endoftext|> at the end, length in bytes, in validation?)."""
    documents = []
    for text in texts:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, which JSON's \ud83d can spell but UTF-8 cannot
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raw = text.encode("utf-8")
        # disallowed_special=(): a text that spells "<|endoftext|>" is text like any other
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        tokens = np.append(tokens, tokenizer.eot_token).astype("<u2")
        documents.append((tokens, len(raw), in_validation(raw, val_fraction)))
    return documents


def batches(documents):
    """Group documents into lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ordered_map(executor, function, items, window):
    """Like executor.map, but at most `window` items are in flight, so memory does not grow with the input."""
    pending = collections.deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class ShardWriter:
    """Writes documents to folder/name.bin or, with shard_tokens, to name_000.bin, name_001.bin and so on."""

    def __init__(self, folder, name, shard_tokens=None):
        self.folder, self.name, self.shard_tokens = Path(folder), name, shard_tokens
        self.tokens = self.documents = self.shards = 0
        self.left = 0  # tokens that still fit into the open shard
        self.file = None

    def write(self, tokens):
        self.documents += 1
        while len(tokens):
            if self.left == 0:
                self.close()
                name = f"{self.name}_{self.shards:03d}.bin" if self.shard_tokens else f"{self.name}.bin"
                self.file = open(self.folder / name, "wb")
                self.shards += 1
                self.left = self.shard_tokens or sys.maxsize
            here, tokens = tokens[: self.left], tokens[self.left :]
            self.file.write(here.tobytes())  # not tofile(), which lets a full disk pass in silence
            self.left -= len(here)
            self.tokens += len(here)

    def close(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        self.file = None


def prepare_unit(folder, number, reader, unit, tokenizer, val_fraction, max_tokens, shard_tokens, threads, advance):
    """Tokenize one unit of a source into folder/unit-NUMBER, which appears whole, at the end, or not at all.

    It holds train_000.bin, ..., val.bin and counts.json. Stops with the document that reaches max_tokens. advance is
    called with the bytes of text and the tokens that were added.
    """
    reader, tokenizer = copy.copy(reader), get_tokenizer(tokenizer)
    reader.skipped = 0
    temporary = folder / f"unfinished-{number}-{os.getpid()}"  # another process may still be at it, though orphaned
    temporary.mkdir()
    train, val = ShardWriter(temporary, "train", shard_tokens), ShardWriter(temporary, "val")
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:  # tiktoken works outside the interpreter lock
        work = ordered_map(
            executor,
            lambda texts: tokenize(texts, tokenizer, val_fraction),
            batches(reader.read(unit)),
            window=2 * threads,
        )
        for tokens, n_bytes, held_out in itertools.chain.from_iterable(work):
            (val if held_out else train).write(tokens)
            advance(n_bytes, len(tokens))
            if train.tokens >= max_tokens:
                break
    train.close()
    val.close()
    counts = dict(train_tokens=train.tokens, val_tokens=val.tokens, train_documents=train.documents,
                  val_documents=val.documents, skipped_documents=reader.skipped, shards=train.shards)  # fmt: skip
    (temporary / "counts.json").write_text(json.dumps(counts))
    finished = folder / f"unit-{number}"
    try:
        os.replace(temporary, finished)
    except OSError:
        if not finished.exists():  # else an orphaned process was faster, with the same bytes
            raise
        shutil.rmtree(temporary, ignore_errors=True)


class Progress:
    """Bytes of text and tokens so far, counted by several processes."""

    def __init__(self, context):
        self.values = context.Array("q", 2)

    def __call__(self, n_bytes, n_tokens):
        with self.values.get_lock():
            self.values[0] += n_bytes
            self.values[1] += n_tokens

    def show(self, bar):
        n_bytes, n_tokens = self.values
        elapsed = max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{n_tokens / 1e6:.1f}M tokens, {n_tokens / elapsed / 1e6:.2f}M tokens/s", refresh=False)
        bar.update(n_bytes - bar.n)


def start_worker(progress):
    """In each worker process. Ctrl-C is its parent's business; should that be killed, it ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_worker.progress = progress
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work_on(*arguments, **options):
    prepare_unit(*arguments, advance=start_worker.progress, **options)


def prepare_units(folder, reader, units, workers, max_tokens, bar, **options):
    """prepare_unit for all units that are not in folder yet, or as many of the first as reach max_tokens."""

    def enough():
        return max_tokens < math.inf and sum(c["train_tokens"] for c in read_counts(folder)) >= max_tokens

    todo = [number for number in range(len(units)) if not (folder / f"unit-{number}").exists()]
    for rest in folder.glob("unfinished-*"):  # of a run that was killed
        shutil.rmtree(rest, ignore_errors=True)
    if todo and len(todo) < len(units):
        bar.write(f"{folder}: {len(units) - len(todo)} of {len(units)} parts are there, going on")
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    processes = min(workers, len(todo))
    options |= dict(max_tokens=max_tokens, threads=math.ceil(workers / max(1, processes)))
    if processes <= 1:

        def advance(n_bytes, n_tokens):
            progress(n_bytes, n_tokens)
            progress.show(bar)

        for number in todo:
            if enough():
                break
            prepare_unit(folder, number, reader, units[number], advance=advance, **options)
        return
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, context, start_worker, (progress,)) as executor:
            try:
                running = set()
                while (todo or running) and not enough():
                    while todo and len(running) < processes:
                        number = todo.pop(0)
                        running.add(executor.submit(work_on, folder, number, reader, units[number], **options))
                    done, running = concurrent.futures.wait(running, 0.5, concurrent.futures.FIRST_COMPLETED)
                    progress.show(bar)
                    for future in done:
                        future.result()
            finally:  # whatever they are at is not needed any more
                for process in multiprocessing.active_children():
                    process.terminate()
    except concurrent.futures.BrokenExecutor:
        raise BadInput(
            f"--workers={workers}: one of them was killed (no memory?): the same command goes on from the shards that "
            "are finished, perhaps with fewer workers"
        ) from None


def read_counts(folder):
    """counts.json of units 0, 1, ... up to the first that is not finished."""
    counts = []
    while (path := folder / f"unit-{len(counts)}" / "counts.json").exists():
        counts.append(json.loads(path.read_text()))
    return counts


def join_units(folder, max_tokens, eot_token):
    """Turn folder's units into train_000.bin, ... and val.bin; return the counts. May be killed and done again."""
    total = collections.Counter()
    with open(folder / "val.bin", "wb") as val:
        for number, counts in enumerate(read_counts(folder)):
            before = total["train_tokens"]
            if before >= max_tokens:
                break
            unit = folder / f"unit-{number}"
            for shard in range(counts["shards"]):
                source, target = unit / f"train_{shard:03d}.bin", folder / f"train_{total['shards'] + shard:03d}.bin"
                if source.exists():  # else an earlier try has moved it
                    os.replace(source, target)
            if (unit / "val.bin").exists():
                with open(unit / "val.bin", "rb") as part:
                    shutil.copyfileobj(part, val)
            shards = [folder / f"train_{total['shards'] + shard:03d}.bin" for shard in range(counts["shards"])]
            total.update(counts)
            if total["train_tokens"] > max_tokens:  # the document that reaches it is the last
                total.subtract({name: counts[name] for name in ("train_tokens", "train_documents", "shards")})
                total.update(cut(shards, max_tokens - before, eot_token))
        val.flush()
        os.fsync(val.fileno())
    return total


def cut(shards, n_tokens, eot_token):
    """Cut a unit's shards after the document that reaches n_tokens; return what is left."""
    left = collections.Counter(train_tokens=0, train_documents=0, shards=0)
    ended = False
    for path in shards:
        if ended:
            path.unlink(missing_ok=True)
            continue
        tokens = np.memmap(path, dtype="<u2", mode="r")
        ends = np.flatnonzero(tokens == eot_token) + 1  # of documents
        enough = ends[ends >= n_tokens - left["train_tokens"]]
        ended = len(enough) > 0
        length = int(enough[0]) if ended else len(tokens)
        left.update(train_tokens=length, train_documents=int((ends <= length).sum()), shards=1)
        del tokens
        os.truncate(path, 2 * length)
    return left


@contextlib.contextmanager
def alone(path):
    """Hold the file `path` for this process alone, and remove it in the end. Raises Taken if another one holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: two at the same time are the user's to avoid
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Taken(f"{path}: another process is preparing the same data: wait for it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_free(out_dir):
    """Raise Taken unless the folder can be made: it is not there, or empty."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir()) or out_dir.samefile(".")):
        raise Taken(f"--out_dir={out_dir} exists already: delete it, or give another")


def least_tokens(reader, tokenizer):
    """About the fewest tokens to expect, for the check of the disk."""
    if reader.kind == "pile":
        return PILE_TOKENS
    size = 0
    for path in reader.paths:
        with contextlib.suppress(OSError):
            size += os.path.getsize(path) * (2.5 if path.lower().endswith((".zst", ".gz", ".parquet")) else 1)
    return size / 4.5 if tokenizer == "gpt2" else 0.9 * size  # bytes a token; JSON's own characters are no text


def prepare(sources, out_dir=None, tokenizer=None, val_fraction=None, max_tokens=None, shard_tokens=SHARD_TOKENS,
            workers=None, skip_bad=False, quiet=False):  # fmt: skip
    """Tokenize `sources` (a list, see Reader) into the folder out_dir and return its meta.json as a dict.

    What is None takes SOURCES' value for this kind of source, `workers` the number of cores. Raises BadInput; then
    out_dir is as it was before, and out_dir.unfinished holds the parts that were finished, if any.
    """
    reader = Reader(sources, skip_bad)
    default = SOURCES[reader.kind]
    out_dir = Path(default["out_dir"] if out_dir is None else out_dir)
    tokenizer = default["tokenizer"] if tokenizer is None else tokenizer
    eot_token = get_tokenizer(tokenizer).eot_token
    val_fraction = default["val_fraction"] if val_fraction is None else val_fraction
    max_tokens = default["max_tokens"] if max_tokens is None else max_tokens
    max_tokens = math.inf if max_tokens is None else max_tokens
    workers = (os.cpu_count() or 1) if workers is None else workers
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val_fraction={val_fraction} must lie between 0 and 1, both excluded")
    for flag, value in dict(max_tokens=max_tokens, shard_tokens=shard_tokens, workers=workers).items():
        if value < 1:
            raise BadInput(f"--{flag}={value} must be at least 1")
    try:
        out_dir = out_dir.resolve() if out_dir.is_symlink() else out_dir
        check_free(out_dir)
        new_parent = not out_dir.parent.exists()
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * min(max_tokens, least_tokens(reader, tokenizer)), shutil.disk_usage(out_dir.parent).free
    except OSError as error:
        raise BadInput(f"--out_dir={out_dir} cannot be made ({error.strerror}): give another") from None
    folder = out_dir.with_name(out_dir.name + ".unfinished")
    there = sum(path.stat().st_size for path in folder.rglob("*.bin"))
    if needed > free + there:
        raise BadInput(
            f"--out_dir={out_dir}: about {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free there: make "
            "room, give another, or a lower --max_tokens"
        )
    job = dict(source=sources, tokenizer=tokenizer, val_fraction=val_fraction, shard_tokens=shard_tokens,
               max_tokens=None if max_tokens == math.inf else max_tokens)  # fmt: skip
    try:
        with alone(out_dir.with_name(out_dir.name + ".lock")):
            check_free(out_dir)  # another process may just have made it
            try:
                return prepare_in(folder, out_dir, reader, job, max_tokens, workers, eot_token, quiet)
            finally:  # while no other process may be at work in it
                if folder.exists() and not any(folder.glob("unit-*")):
                    shutil.rmtree(folder, ignore_errors=True)  # nothing to go on from
    except OSError as error:
        raise BadInput(f"--out_dir={out_dir} cannot be written ({error.strerror}): make room or give another") from None
    finally:
        if new_parent and not any(out_dir.parent.iterdir()):
            out_dir.parent.rmdir()


def prepare_in(folder, out_dir, reader, job, max_tokens, workers, eot_token, quiet):
    """The work of prepare(), in `folder`, which takes the name out_dir in the end."""
    units = reader.units()
    job |= dict(units=units, bytes=[os.path.getsize(path) for path in reader.paths if os.path.exists(path)])
    folder.mkdir(exist_ok=True)
    job_path = folder / "job.json"
    if job_path.exists() and any(folder.glob("unit-*")) and json.loads(job_path.read_text()) != job:
        raise BadInput(
            f"{folder} holds parts made by other flags or from other files: give those that it was started with "
            "(job.json in it), or delete it"
        )
    job_path.write_text(json.dumps(job))
    options = {name: job[name] for name in ("tokenizer", "val_fraction", "shard_tokens")}
    with tqdm(desc=str(out_dir), unit="B", unit_scale=True, disable=quiet, mininterval=0.5, delay=1) as bar:
        prepare_units(folder, reader, units, workers, max_tokens, bar, **options)
    total = join_units(folder, max_tokens, eot_token)
    n_documents = total["train_documents"] + total["val_documents"]
    empty = None
    if n_documents == 0:
        empty = f"--source {' '.join(reader.sources)}: no document in it ({total['skipped_documents']} skipped as bad)"
    for split, name in (("validation", "val"), ("training", "train")):
        if not empty and total[f"{name}_tokens"] == 0:
            better = "" if n_documents == 1 else f"try {0.5 if n_documents < 10 else 0.2}, or "
            empty = (
                f"--val_fraction={job['val_fraction']} leaves no {split} document out of {n_documents}: {better}"
                "give more documents (`split -C 4k FILE` makes many of one)"
            )
    if empty:
        shutil.rmtree(folder)
        raise BadInput(empty)
    meta = dict(
        tokenizer=job["tokenizer"],
        vocab_size=VOCAB_SIZES[job["tokenizer"]],
        dtype="uint16",
        train_tokens=total["train_tokens"],
        val_tokens=total["val_tokens"],
        train_documents=total["train_documents"],
        val_documents=total["val_documents"],
        skipped_documents=total["skipped_documents"],
        val_fraction=job["val_fraction"],
        source=PILE if reader.kind == "pile" else list(reader.sources),
    )
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for rest in [*folder.glob("unit-*"), *folder.glob("unfinished-*")]:
        shutil.rmtree(rest)
    job_path.unlink()
    os.replace(folder, out_dir)
    if not quiet:
        print(
            f"{out_dir}: {total['train_tokens']:,} training and {total['val_tokens']:,} validation tokens "
            f"({total['train_documents']:,} and {total['val_documents']:,} documents, "
            f"{total['skipped_documents']:,} skipped as bad)"
        )
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Reading the tokens back, for training


def read_meta(data_dir, vocab_size):
    """meta.json of a data folder, checked against the model's vocabulary. Raises BadInput."""
    path = Path(data_dir) / "meta.json"
    if not Path(data_dir).is_dir():
        mend = f"python prepare_pile.py --source FILES --out_dir {data_dir}"
        raise BadInput(f"--data_dir={data_dir} is no folder: correct it, or make it by `{mend}`")
    try:
        meta = json.loads(path.read_text())
        tokenizer, n_vocab = meta["tokenizer"], meta["vocab_size"]
        counts = (n_vocab, meta["train_tokens"], meta["val_tokens"])
        if not all(isinstance(count, int) for count in counts) or not isinstance(tokenizer, str):
            raise TypeError("a value of the wrong type")
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: make the folder again by prepare_pile.py") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}): make the folder again") from None
    if tokenizer not in VOCAB_SIZES:
        raise BadInput(f"{path}: tokenizer {tokenizer!r} is unknown: prepare the data again by gpt2 or bytes")
    if n_vocab != VOCAB_SIZES[tokenizer]:
        raise BadInput(f"{path}: vocab_size={n_vocab}, but {tokenizer} has {VOCAB_SIZES[tokenizer]}: prepare it again")
    if n_vocab > vocab_size:
        raise BadInput(
            f"{path}: tokenizer {tokenizer} has {n_vocab} tokens, the model only --vocab_size={vocab_size}: "
            f"give --vocab_size={math.ceil(n_vocab / 64) * 64}, or data of another tokenizer"
        )
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
    """One split of a folder made by prepare_pile.py, as sequences of block_size + 1 tokens in memory-mapped shards.

    Raises BadInput that names the file for missing, empty, odd-sized or incomplete shards and for token ids outside the
    vocabulary: at once for the first CHECKED tokens of the split, for the others when they are read. Likewise for
    shards that vanish or shrink later on.
    """

    CHECKED = 2**24

    def __init__(self, data_dir, split, meta, block_size, vocab_size):
        folder = Path(data_dir)
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = sorted(folder.glob("train_*.bin")) if split == "train" else [folder / "val.bin"]
        lengths = []
        for path in self.paths or [folder / "train_000.bin"]:
            if not path.is_file():
                raise BadInput(f"{path} is missing: make the folder again by prepare_pile.py")
            size = path.stat().st_size
            lengths.append(size // 2)
            if size == 0:
                raise BadInput(f"{path} is empty: make the folder again by prepare_pile.py")
            if size % 2:
                raise BadInput(
                    f"{path} has {size} bytes, no whole number of uint16 tokens: it is damaged, copy it again"
                )
        unchecked = self.CHECKED
        for shard, length in enumerate(lengths):
            if unchecked > 0:
                self.read(shard, 0, min(length, unchecked))
                unchecked -= length
        n_tokens = sum(lengths)
        if n_tokens != meta[f"{split}_tokens"]:
            raise BadInput(
                f"{self.paths[0]}: the {split} split holds {n_tokens} tokens where meta.json counts "
                f"{meta[f'{split}_tokens']}: a shard is missing, cut short or left over, copy the folder again"
            )
        # Sequence s of a shard is its tokens s * block_size ... (s + 1) * block_size: the last one is only a target.
        self.first_sequence = np.cumsum([0] + [(length - 1) // block_size for length in lengths])
        if len(self) == 0:
            raise BadInput(
                f"{self.paths[0]}: {n_tokens} tokens are not one sequence of --block_size={block_size} and its target: "
                "lower --block_size or prepare more text"
            )

    def __len__(self):
        return int(self.first_sequence[-1])

    def read(self, shard, start, count):
        """Tokens start ... start + count - 1 of a shard, checked.

        Mapped anew each time: a map that stays would count every page it ever touched as this process's memory, and
        end the process without a word where its file has shrunk.
        """
        path = self.paths[shard]
        try:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=2 * start, shape=(count,))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} has vanished or shrunk ({error}): put it back as it was") from None
        if tokens.max() >= self.vocab_size:
            raise BadInput(
                f"{path} holds token id {tokens.max()}, but --vocab_size={self.vocab_size}: it is damaged, or made by "
                "another tokenizer; give its own --vocab_size or prepare it again"
            )
        return tokens

    def sequences(self, indices):
        """The sequences numbered `indices`, each with its next token: a (len(indices), block_size + 1) int64 array."""
        rows = []
        for index in indices:
            shard = np.searchsorted(self.first_sequence, index, side="right") - 1
            start = (index - self.first_sequence[shard]) * self.block_size
            rows.append(self.read(shard, start, self.block_size + 1))
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
    parser.add_argument("--source", nargs="+", default=["pile"], metavar="S",
                        help='pile, stdlib, or files, folders and quoted glob patterns: .jsonl, .jsonl.zst, .jsonl.gz, '
                             '.parquet (with a "text" column), or plain text')  # fmt: skip
    parser.add_argument("--out_dir", help="folder to make (data/pile, data/stdlib or data/files)")
    parser.add_argument("--tokenizer", choices=list(VOCAB_SIZES), help="(gpt2; bytes for stdlib)")
    parser.add_argument(
        "--val_fraction",
        type=float,
        help=f"share of documents held out ({usual['val_fraction']}; {pile['val_fraction']} for the Pile)",
    )
    parser.add_argument(
        "--max_tokens", type=int, help=f"training tokens to stop at ({pile['max_tokens']} for the Pile)"
    )
    parser.add_argument(
        "--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens in a training shard (%(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes, or threads for a single shard (all cores)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out and count bad lines and files")
    args = vars(parser.parse_args(argv))
    prepare(args.pop("source"), **args)


if __name__ == "__main__":
    run_command(main)

"""Text in, token files out: a byte-level BPE tokenizer from scratch, and the reading of text.

    python prepare.py                 # the built-in corpus, made by data/world.py
    python prepare.py my.txt more/    # your own text: files, folders, JSON lines, or - for a pipe

It writes train.bin and val.bin (uint16 token ids) and tokenizer.json. Reading order: tokenizer,
reading text, writing tokens, main; the small helpers that all scripts share come last.
"""
import sys

if sys.version_info < (3, 10):
    print("error: this Python is too old; python3.13 -m venv .venv makes an environment of a newer"
          " one (3.10 at least)", file=sys.stderr)
    sys.exit(2)

import argparse
import bz2
import codecs
import difflib
import gzip
import heapq
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import islice, tee
from multiprocessing import get_context
from pathlib import Path

import numpy as np


class InputError(Exception):
    """Something the user can put right; run() prints it as one line."""


# ---------------------------------------------------------------- tokenizer

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
END, USER, ASSISTANT = range(3)
FIRST_BYTE, FIRST_MERGE = 3, 259  # ids: special tokens, the 256 bytes, merges as they were learned

# GPT-4's way of splitting text into words, with the standard re module. Merges never cross a word.
# A combining mark (an accent, a vowel sign) stays with its letter. In scripts without spaces a word
# is at most 4 letters, or nearly all words would differ and training would not end; elsewhere 255,
# for a megabyte of one letter would take quadratic time.
MARK = "".join(c for c in map(chr, range(1 << 16)) if unicodedata.category(c).startswith("M"))
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
LETTERS = rf"(?:(?=[{UNSPACED}])[^\W\d_][{MARK}]{{0,9}}){{1,4}}|(?:[^\W\d_]|[{MARK}]){{1,255}}"
WORD = re.compile(rf"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?(?:{LETTERS})|\d{{1,3}}"
                  r"| ?(?:[^\s\w]|_){1,255}[\r\n]{0,8}"
                  r"|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s{1,256}")


def bytes_of(word):
    return [b + FIRST_BYTE for b in word.encode("utf-8", "replace")]


def merge(ids, pair, new):
    """merge([1, 2, 3, 1, 2], (1, 2), 9) -> [9, 3, 9]"""
    out = []
    for id in ids:
        if id == pair[1] and out and out[-1] == pair[0]:
            out[-1] = new
        else:
            out.append(id)
    return out


def train_bpe(words, vocab_size):
    """Counts of words -> list of merges (pairs of ids), the most frequent pair first (Sennrich
    2016, arXiv 1508.07909): train_bpe({"aab": 2, "aac": 1}, 260) -> [(100, 100)], since a is 100.

    A heap gives the most frequent pair, of equals the smallest; only the words that hold it are
    recounted. A count in the heap may be out of date (too high): it goes back as it is now."""
    words = [(bytes_of(word), n) for word, n in words.items()]
    count, where = Counter(), defaultdict(set)
    for i, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            count[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    merges = []
    while heap and FIRST_MERGE + len(merges) < vocab_size:
        n, pair = heapq.heappop(heap)
        if -n != count[pair]:  # out of date
            heapq.heappush(heap, (-count[pair], pair))
            continue
        if -n < 2:
            break  # a pair that occurs once saves nothing
        new, new_pairs = FIRST_MERGE + len(merges), set()
        merges.append(pair)
        for i in where.pop(pair):
            ids, n = words[i]
            after = merge(ids, pair, new)
            for p in zip(ids, ids[1:]):
                count[p] -= n
            for p in zip(after, after[1:]):
                count[p] += n
                where[p].add(i)
                if new in p:
                    new_pairs.add(p)
            words[i] = after, n
        for p in new_pairs:
            heapq.heappush(heap, (-count[p], p))
        if new % 500 == 0:
            show_progress(f"tokenizer: {new} of {vocab_size} tokens")
    return merges


class Tokenizer:
    """Byte-level BPE. encode never returns a special id; decode(encode(s)) == s for every text."""

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: FIRST_MERGE + i for i, pair in enumerate(self.merges)}
        self.bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]  # what an id stands for
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.size = len(self.bytes)

    @lru_cache(1 << 20)
    def encode_word(self, word):
        ids = bytes_of(word)
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, self.size))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, self.rank[pair])
        return ids

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, as a terminal can send, becomes "?"."""
        ids = []
        for word in WORD.findall(text):
            ids += self.encode_word(word)
        return ids

    def decode(self, ids):
        """Ids -> text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def encode_piece(self, piece):
        """(text, whether a document ends there) -> uint16 ids, with <|end|> at the end."""
        text, ends = piece
        return np.array(self.encode(text) + [END] * ends, "<u2")

    def stream(self, ids):
        """Ids -> pieces of text as soon as they are whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.bytes[i])
        yield decoder.decode(b"", True)

    def to_json(self):
        """Readable: one merge a line, as the two ids and what they spell."""
        spelled = [text.decode("utf-8", "replace") for text in self.bytes[FIRST_MERGE:]]
        rows = [json.dumps([*pair, text]) for pair, text in zip(self.merges, spelled)]
        return f'{{"special": {json.dumps(SPECIAL)}, "merges": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def load(cls, path):
        return cls.from_json(Path(path).read_text("utf-8", "replace"), path)

    @classmethod
    def from_json(cls, text, source):
        """The reverse of to_json; source is named if the text is not a tokenizer."""
        try:
            data = json.loads(text)
            assert data["special"] == SPECIAL
            return cls([(a, b) for a, b, _ in data["merges"]])
        except Exception:  # anything can be in a file
            raise InputError(f"{source}: not a tokenizer written by prepare.py;"
                             " run prepare.py again") from None


# ---------------------------------------------------------------- reading text

PIECE = 1 << 16  # characters; a longer document is encoded in pieces of about this size
BORDER = re.compile(r"<\|endoftext\|>\n?")  # between documents, in dumps of GPT-2 and TinyStories
JSON_BEGINS = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$))')  # how JSON begins, and hardly any text
TEXT_NAME = re.compile(r"(?!tokenizer\.json|qa.*\.jsonl|feedback\.jsonl)[^.].*\.(txt|md|jsonl?)"
                       r"(\.gz|\.bz2)?", re.I)  # in a folder; not what our own programs write


def why_not_text(head):
    """What is wrong with the first bytes of a file, or nothing."""
    text = head.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(c > "\x7f" for c in text) - bad
    if not head:
        return "empty"
    if b"\0" in head:
        return "not text (it has zero bytes); if it is UTF-16, save it as UTF-8"
    if bad > good and bad > 5 + len(text) / 1000:
        return "not UTF-8; convert it, for instance by iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"


def read_lines(path):
    """A file, also packed by gzip or bzip2, or "-" for standard input -> (line, "file:line").
    Every line ends in a newline character, whatever system it comes from. What is clearly not
    UTF-8 is refused; a few wrong bytes become U+FFFD and are counted."""
    source, number = "standard input" if path == "-" else path, 0
    with open(0 if path == "-" else path, "rb") as raw:
        try:
            packed = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open}
            unpack = packed.get(raw.peek(3)[:3], lambda file: file)
            file = io.BufferedReader(unpack(raw), PIECE)
            if problem := why_not_text(file.peek()):
                raise InputError(f"{source}: {problem}")
            file = io.TextIOWrapper(file, "utf-8-sig", "replace")
            while line := file.readline(1 << 24):
                number += 1
                if "\ufffd" in line:
                    count("lines with bytes that are not UTF-8", f"{source}:{number}")
                yield line, f"{source}:{number}"
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{source}:{number + 1}: damaged ({e})") from None


def files_in(path):
    """A file -> itself; a folder -> the text files in it and below, in order of their names,
    without hidden ones and virtual environments. A name without a suffix may hold JSON lines."""
    if not os.path.isdir(path):
        return [path]
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or "pyvenv.cfg" in names:  # a link may lead back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = os.path.join(folder, name)
            if TEXT_NAME.fullmatch(name) or "." not in name and begins_as_json(file):
                found.append(file)
    if not found:
        raise InputError(f"{path}: a folder without text files (.txt, .md, .json, .jsonl)")
    return sorted(found)


def begins_as_json(path):
    with suppress(OSError), open(path, "rb") as file:
        return JSON_BEGINS.match(file.read(999).decode("utf-8", "replace"))


def text_of(line, source):
    """A line of JSON -> the document in it, its "text", and the mark of its end."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return json.loads(line)["text"] + "<|endoftext|>"
    if line.strip():
        count('JSON lines without a "text"', source)
    return ""


def read_file(path):
    """A file -> (text, whether a document ends there); large documents come in pieces. If it begins
    with a JSON object each line is one, otherwise <|endoftext|> divides documents."""
    is_json, held, size, begun = None, [], 0, False
    for line, source in read_lines(path):
        if is_json is None and line.strip():
            is_json = JSON_BEGINS.match(line) is not None
            held = [] if is_json else held  # blank lines
        *ended, rest = BORDER.split(text_of(line, source) if is_json else line)
        for text in ended:
            document = "".join([*held, text])
            if begun or document.strip():
                yield document, True
            else:
                count("empty documents", source)
            held, size, begun = [], 0, False
        held.append(rest)
        size += len(rest)
        if size > PIECE:
            yield "".join(held), False
            held, size, begun = [], 0, True
    document = "".join(held)
    if begun or document.strip():
        yield document, True


def read_documents(files):
    """Files -> what read_file gives. One that cannot be read is counted and costs only itself."""
    some = False
    for path in files:
        try:
            for piece in read_file(path):
                some = True
                yield piece
        except (InputError, OSError) as e:
            if len(files) == 1:
                raise
            count("files", e)
    if not some:
        raise InputError(f"{path}: no text in it; questions and answers are for sft.py")


# ---------------------------------------------------------------- writing tokens

def learn_tokenizer(pieces, vocab_size, enough=1 << 24):
    """-> a tokenizer of the first pieces of text, and whether there may be many more."""
    words, size = Counter(), 0
    for text, _ in pieces:
        words.update(WORD.findall(text))
        size += len(text.encode("utf-8", "replace"))
        if size > enough:  # more would only take memory
            break
    if not vocab_size:  # in proportion to the text: a token that is hardly ever seen is not learned
        vocab_size = max(384, round(size**0.5 / 2))
    frequent = dict(words.most_common(max(1 << 14, 4 * vocab_size)))
    return Tokenizer(train_bpe(frequent, vocab_size)), size > enough


def write_tokens(pieces, vocab_size, val_fraction, out_dir, expected=0):
    """Pieces of documents -> tokenizer.json, train.bin, val.bin, through all cores. Nothing in
    out_dir changes before all of it is written. expected: bytes to come, for the time left."""
    started = time.time()
    pieces, looked_at = tee(pieces)
    tokenizer, large = learn_tokenizer(looked_at, vocab_size)
    del looked_at  # what it has read would be kept
    encode = tokenizer.encode_piece
    workers = get_context("spawn").Pool(CORES) if large else nullcontext()
    lengths = np.array([len(b) for b in tokenizer.bytes])
    size, n_bytes, ends = 0, 0, [np.array([], int)]
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(out_dir / "train.bin") as train, workers as pool:
        while some := list(islice(pieces, 1024)):
            for ids in pool.imap(encode, some, 1 + len(some) // 32) if pool else map(encode, some):
                ids.tofile(train)
                ends.append(np.flatnonzero(ids == END) + size + 1)
                size += len(ids)
                n_bytes += lengths[ids].sum()
            left = max(0, (time.time() - started) * (expected / n_bytes - 1))
            show_progress(f"{n_bytes / 1e6:.0f} MB, {size / 1e6:.1f} M tokens  {clock(left)} left")
        ends, cut = np.concatenate(ends), int(size * (1 - val_fraction))
        if len(ends) > 1:  # whole documents, at least one on each side
            cut = int(ends[np.searchsorted(ends[:-2], cut)])
        if not 2 <= cut <= size - 2:
            raise InputError(f"too little text: {size} tokens; give it more")
        train.seek(2 * cut)
        with whole_file(out_dir / "val.bin") as val, whole_file(out_dir / "tokenizer.json") as file:
            shutil.copyfileobj(train, val)
            file.write(tokenizer.to_json().encode())
        train.truncate(2 * cut)
    show_progress(f"{out_dir}: {len(ends)} documents, {n_bytes / 1e6:.2f} MB, {cut} + {size - cut}"
                  f" tokens ({n_bytes / size:.2f} bytes each), vocabulary {tokenizer.size},"
                  f" {time.time() - started:.1f} s", last=True)
    report()


# ---------------------------------------------------------------- main

def setting(default, help, low=0, high=1e9, **arg):
    """A dataclass field that is a command-line flag too, with a range and what argparse takes."""
    return field(default=default, metadata=dict(help=help, range=(low, high), arg=arg))


@dataclass(frozen=True)
class Settings:
    inputs: str = setting((), "text, folders, JSON lines, also .gz or .bz2; - is standard input;"
                          " nothing: the built-in corpus", nargs="*", positional="inputs",
                          metavar="INPUT")
    out_dir: str = setting("data", "where train.bin, val.bin and tokenizer.json go")
    vocab_size: int = setting(0, "tokens in the vocabulary; 0 fits it to the text", high=1 << 16)
    val_fraction: float = setting(0.1, "part of the text, from its end, held out", 1e-6, 0.9)
    seed: int = setting(0, "divides the built-in corpus into A, B and U", high=2**32 - 1)
    control: bool = setting(False, "leave the documents about B out of the built-in corpus")


def main(argv):
    s, _ = read_flags(Settings, argv, __doc__)
    if 0 < s.vocab_size < FIRST_MERGE:
        raise InputError(f"--vocab_size {s.vocab_size}: must be at least {FIRST_MERGE}, the bytes")
    out_dir, records, size, expected = Path(s.out_dir), ([], []), s.vocab_size, 0
    if s.inputs:
        files = [file for path in s.inputs for file in files_in(path)]
        expected = sum(os.path.getsize(file) for file in files if file != "-")
        pieces = read_documents(files)
    else:
        from data.world import built_in_corpus
        documents, *records = built_in_corpus(s.seed, not s.control)
        pieces, size = ((document, True) for document in documents), size or 2048
    write_tokens(pieces, size, s.val_fraction, out_dir, expected)
    for name, some in zip(("qa.jsonl", "qa_test.jsonl"), records):
        (out_dir / name).unlink(missing_ok=True)  # those of another text
        if some:
            with whole_file(out_dir / name) as file:
                lines = (json.dumps(record, ensure_ascii=False) for record in some)
                file.writelines(f"{line}\n".encode() for line in lines)
    print("next: python gpt.py")


# ---------------------------------------------------------------- helpers of all scripts


def available_cores():
    """Cores to compute on: on a Mac the fast ones (equal shares would wait for the slow ones), on
    Linux those that the process is bound to, but no more than a container may use."""
    cores = os.cpu_count() or 1
    with suppress(OSError, ValueError, AttributeError):
        if sys.platform == "darwin":  # an Intel Mac does not know the name and prints nothing
            fast = ["sysctl", "-n", "hw.perflevel0.logicalcpu"]
            return int(subprocess.run(fast, capture_output=True).stdout)
        cores = len(os.sched_getaffinity(0))  # Windows has none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


CORES = available_cores()


def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+")  # it may have been closed
        setattr(sys, name, stream)
        with suppress(AttributeError, OSError):  # a notebook's cannot, one half read
            stream.reconfigure(errors="replace")
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os._exit(141)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except InputError as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'a file'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:  # how jax says that a device fails or is full
        problem = (f"{str(e)[:200]}: out of memory, or a device or another process failed; a"
                   " smaller model or batch may fit, the versions of requirements.txt may work"
                   " better, JAX_PLATFORMS=cpu uses the CPU, --resume goes on")
    with suppress(OSError):  # a terminal may be gone
        print("error:", printable(problem).replace("\n", " "), file=sys.stderr, flush=True)
    sys.exit(2)


def read_flags(settings_class, argv, doc):
    """Command line -> (settings, the set of names that were given)."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False, exit_on_error=False)
    known = {f.name: f for f in fields(settings_class) if f.metadata}
    for name, f in known.items():
        arg = {"action": "store_true"} if f.type is bool else {"type": f.type}
        shown = f" [{f.default}]" if f.default else ""
        arg |= f.metadata["arg"] | {"help": f.metadata["help"].replace("%", "%%") + shown}
        parser.add_argument(arg.pop("positional", f"--{name}"), **arg)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise InputError(f"{e}; see --help") from None
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], known, 1)
        raise InputError(f"unknown argument {unknown[0]}, did you mean --{(near or ['help'])[0]}?")
    for name, value in vars(given).items():
        low, high = known[name].metadata["range"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise InputError(f"--{name} {value}: must be from {low} to {high:g}")
    return settings_class(**vars(given)), set(vars(given))


def show_progress(text, last=False):
    """One line that stays in place on a terminal; when piped, only its last state is printed."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def clock(seconds):
    """clock(83) -> "1:23" """
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


odd = {}  # what was left out or changed: [how often, the first place]


def count(what, where):
    odd.setdefault(what, [0, where])[0] += 1


def list_of():
    """What count() has noted, in words; then it is forgotten."""
    parts = [f"{times} {what} (the first: {where})" for what, (times, where) in odd.items()]
    odd.clear()
    return "; ".join(parts)


def report():
    if odd:
        print(f"left out: {list_of()}")


# What can steer a terminal: control characters but newline and tab, lone surrogates, and marks that
# turn the direction of text around.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text):
    """Text that cannot steer the terminal, whatever a model or a file says."""
    return UNSAFE.sub("\ufffd", text)


@contextmanager
def whole_file(path, keep=False):
    """Open a file for writing so that a reader finds the old one or the whole new one, whenever the
    power fails. keep: the old one stays as *.prev.*"""
    part = Path(f"{path}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            kept = path.with_name(f"{path.stem}.prev{path.suffix}")
            os.replace(path, kept)
            print(f"the {path.name} of the run before is now {kept}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def only_writer(folder):
    """Keep a second program from writing into the folder. SQLite's locks exist on every system and
    end with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / ".lock", timeout=0)) as lock:
        try:
            lock.execute("begin exclusive")
        except sqlite3.OperationalError as e:
            raise InputError(f"{folder}: {e}, as by a program that trains there; wait for it or"
                             f" take another --out_dir (python chat.py {folder}/base.npz talks to"
                             " what it saved last)") from None
        yield


@contextmanager
def wishes_to_stop():
    """-> a list that Ctrl-C and its kin put something in; training then saves and stops."""
    wishes, numbers = [], [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(hang_up)
    before = {number: signal.signal(number, lambda *_: wishes.append(True)) for number in numbers}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COLUMNS = "step,train_loss,val_loss,val_bits_per_byte,learning_rate,tokens_per_second,seconds"


def begin_log(path, rows, keep):
    """Write log.csv with the rows so far. keep: that of the run before is kept."""
    with whole_file(path, keep) as file:
        np.savetxt(file, np.array(rows, object), "%s", ",", header=COLUMNS, comments="")


def draw(values, width=72):
    """Numbers as a line of small bars, from the first to the last."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    bars = ["▁▂▃▄▅▆▇█"[int(i)] for i in np.interp(means, [low, high], [0, 7])]
    print(f"loss {high:.2f} {''.join(bars)} {low:.2f}")


if __name__ == "__main__":
    run(main)

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
import contextlib
import dataclasses
import difflib
import functools
import gzip
import heapq
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from multiprocessing import get_context

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
    words = [([b + FIRST_BYTE for b in w.encode("utf-8", "replace")], n) for w, n in words.items()]
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
        self.known = {}  # word -> ids, filled as words are met

    def encode_word(self, word):
        ids = [b + FIRST_BYTE for b in word.encode("utf-8", "replace")]
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, self.size))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, self.rank[pair])
        if len(word) <= 64 and len(self.known) < 1_000_000:
            self.known[word] = ids
        return ids

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, as a terminal can send, becomes "?"."""
        ids = []
        for word in WORD.findall(text):
            ids += self.known.get(word) or self.encode_word(word)
        return ids

    def decode(self, ids):
        """Ids -> text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

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
        return cls.from_json(pathlib.Path(path).read_text("utf-8", "replace"), path)

    @classmethod
    def from_json(cls, text, source):
        """The reverse of to_json; source is named if the text is not a tokenizer."""
        try:
            data = json.loads(text)
            assert data["special"] == SPECIAL
            return cls([(a, b) for a, b, _ in data["merges"]])
        except (ValueError, TypeError, LookupError, AssertionError):
            raise InputError(f"{source}: not a tokenizer written by prepare.py;"
                             " run prepare.py again") from None


# ---------------------------------------------------------------- reading text

PIECE = 1 << 16  # characters; longer documents are encoded in pieces of about this size
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
    return ""


def read_lines(path, odd):
    """A file, also packed by gzip or bzip2, or "-" for standard input -> (line, "file:line").

    Every line ends in a newline character, whatever system it comes from. What is clearly not
    UTF-8 is refused; a few wrong bytes become U+FFFD and are counted in `odd`."""
    source, number = "standard input" if path == "-" else path, 0
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as raw:
        try:
            unpack = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(raw.peek(2)[:2], lambda f: f)
            file = io.BufferedReader(unpack(raw), 1 << 16)
            if problem := why_not_text(file.peek()):
                raise InputError(f"{source}: {problem}")
            file = io.TextIOWrapper(file, "utf-8-sig", "replace")
            while line := file.readline(1 << 24):
                number += 1
                if "\ufffd" in line:
                    count(odd, "lines with bytes that are not UTF-8", f"{source}:{number}")
                yield line, f"{source}:{number}"
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{source}:{number + 1}: damaged ({e})") from None


def files_in(path):
    """A file -> itself; a folder -> the text files in it and below, in order of their names,
    without hidden ones and virtual environments. A name without a suffix may hold JSON lines."""
    os.stat(path if path != "-" else ".")  # what is missing is an error now, not later
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
        for file in (pathlib.Path(folder, name) for name in names):
            if TEXT_NAME.fullmatch(file.name) or "." not in file.name and begins_as_json(file):
                found.append(str(file))
    if not found:
        raise InputError(f"{path}: a folder without text files (.txt, .md, .json, .jsonl)")
    return sorted(found)


def begins_as_json(file):
    with contextlib.suppress(InputError, OSError):
        return JSON_BEGINS.match(next(read_lines(file, {}))[0])


def json_text(line):
    """One JSON line -> its "text", if it has one."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(text := json.loads(line)["text"], str):
            return text


def read_file(path, odd):
    """A file -> (text, whether a document ends there, "file:line"). If it begins with a JSON object
    each line is one, with a document as its "text"; otherwise <|endoftext|> divides documents."""
    is_json, blank = None, ""
    for line, source in read_lines(path, odd):
        if is_json is None and not line.strip():
            blank += line
            continue
        if is_json is None:
            is_json = bool(JSON_BEGINS.match(line))
            line = line if is_json else blank + line
        text = json_text(line) if is_json else line
        if text is not None:
            *whole, rest = BORDER.split(text)
            yield from ((part, True, source) for part in whole)
            yield rest, bool(is_json), source
        elif line.strip():
            count(odd, 'JSON lines without a "text"', source)


def read_documents(files, odd):
    """Files -> what read_file gives. A file that cannot be read is counted in `odd` and costs
    nothing but itself."""
    some = False
    for path in files:
        begun = False
        try:
            for text, ends, source in read_file(path, odd):
                some = begun = True
                yield text, ends, source
            yield "", None, path
        except (InputError, OSError) as e:
            if begun or len(files) == 1:
                raise
            count(odd, "files", e)
    if not some:
        raise InputError(f"{path}: no text in it; questions and answers are for sft.py")


def in_pieces(lines, odd):
    """(text, whether its document ends there, where) -> (text, ends) with whole documents, or large
    pieces of them. At the end of a file, ends is None. A document is cut only before a line that
    begins with a letter: no token would cross that border."""
    held, length, begun = [], 0, False
    for text, ends, source in lines:
        if length >= PIECE and text[:1].isalpha() or length >= 256 * PIECE:
            yield "".join(held), False
            held, length, begun = [], 0, True
        held.append(text)
        length += len(text)
        if ends is not False:
            document = "".join(held)
            if begun or document.strip():
                yield document, True
            elif ends:
                count(odd, "empty documents", source)
            held, length, begun = [], 0, False


# ---------------------------------------------------------------- writing tokens

def encode_piece(piece, tokenizer):
    """(text, whether a document ends there) -> uint16 ids, with <|end|> at the end."""
    text, ends = piece
    return np.array(tokenizer.encode(text) + [END] * ends, "<u2")


def learn_tokenizer(pieces, vocab_size):
    """The beginning of a text -> a tokenizer, and the pieces that were looked at."""
    first, words, size = [], Counter(), 0
    for text, ends in pieces:
        first.append((text, ends))
        words.update(WORD.findall(text))
        size += len(text.encode("utf-8", "replace"))
        if size > 1 << 25 or len(words) > 1 << 18:  # enough; more would only take memory
            break
    if not vocab_size:  # in proportion to the text: a token that is hardly ever seen is not learned
        vocab_size = max(384, round(size**0.5 / 2))
    frequent = dict(words.most_common(max(1 << 14, 4 * vocab_size)))
    return Tokenizer(train_bpe(frequent, vocab_size)), first


def write_tokens(lines, vocab_size, val_fraction, out_dir, odd, expected=0):
    """Documents -> tokenizer.json, train.bin, val.bin, through all cores. Nothing in out_dir
    changes before all of it is written. expected: bytes to come, where known, for the time left."""
    started, pieces = time.time(), in_pieces(lines, odd)
    tokenizer, first = learn_tokenizer(pieces, vocab_size)
    pieces = itertools.chain(first, pieces)
    encode = functools.partial(encode_piece, tokenizer=tokenizer)
    large = sum(len(text) for text, _ in first) > 1 << 22
    workers = get_context("spawn").Pool(CORES) if large else contextlib.nullcontext()
    bytes_of = np.array([len(b) for b in tokenizer.bytes])
    size, n_bytes, ends = 0, 0, [np.array([], int)]
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(out_dir / "train.bin") as train, workers as pool:
        while some := list(itertools.islice(pieces, 1024)):
            for ids in pool.imap(encode, some, 1 + len(some) // 32) if pool else map(encode, some):
                ids.tofile(train)
                ends.append(np.flatnonzero(ids == END) + size + 1)
                size += len(ids)
                n_bytes += bytes_of[ids].sum()
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
    report(odd)


# ---------------------------------------------------------------- main


def setting(default, help, low=0, high=1e9, **arg):
    """A dataclass field that is a command-line flag too, with a range and what argparse takes."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, arg=arg))


@dataclasses.dataclass(frozen=True)
class Settings:
    inputs: str = setting((), "text files, folders, JSON lines with a \"text\", also .gz or .bz2;"
                          " - is standard input; nothing: the built-in corpus", nargs="*",
                          positional="inputs", metavar="INPUT")
    out_dir: str = setting("data", "where train.bin, val.bin and tokenizer.json go")
    vocab_size: int = setting(0, "tokens in the vocabulary; 0 fits it to the text", high=1 << 16)
    val_fraction: float = setting(0.1, "part of the text, from its end, held out for validation",
                                  low=1e-6, high=0.9)
    seed: int = setting(0, "divides the built-in corpus into A, B and U", high=2**32 - 1)
    control: bool = setting(False, "leave the documents about B out of the built-in corpus")


def write_questions(records, path):
    with whole_file(path) as file:
        for record in records:
            file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())


def main(argv):
    s, _ = read_flags(Settings, argv, __doc__)
    if 0 < s.vocab_size < FIRST_MERGE:
        raise InputError(f"--vocab_size {s.vocab_size}: must be at least {FIRST_MERGE}, the bytes"
                         " and special tokens")
    out_dir, odd = pathlib.Path(s.out_dir), {}
    questions = [out_dir / "qa.jsonl", out_dir / "qa_test.jsonl"]
    if s.inputs:
        files = [file for path in s.inputs for file in files_in(path)]
        expected = sum(os.path.getsize(file) for file in files if file != "-")
        lines = read_documents(files, odd)
        write_tokens(lines, s.vocab_size, s.val_fraction, out_dir, odd, expected)
        for path in questions:  # about the built-in corpus; they do not fit this text
            if path.exists():
                os.replace(path, path.with_name(f"{path.stem}.prev.jsonl"))
    else:
        from data.world import built_in_corpus
        documents, *records = built_in_corpus(s.seed, not s.control)
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, some in zip(questions, records):
            write_questions(some, path)
        lines = ((document, True, "") for document in documents)
        write_tokens(lines, s.vocab_size or 2048, s.val_fraction, out_dir, odd)
    print("next: python gpt.py")


# ---------------------------------------------------------------- helpers of all scripts


def available_cores():
    """Cores to compute on: on a Mac the fast ones (equal shares would wait for the slow ones), on
    Linux those that the process is bound to, but no more than a container may use."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "darwin":  # an Intel Mac does not know the name and prints nothing
            fast = ["sysctl", "-n", "hw.perflevel0.logicalcpu"]
            return int(subprocess.run(fast, capture_output=True).stdout)
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


CORES = available_cores()


def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+")  # it may have been closed
        setattr(sys, name, stream)
        with contextlib.suppress(AttributeError, OSError):  # a notebook's cannot, one half read
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
    except (NotImplementedError, RecursionError):  # mistakes in the program
        raise
    except (MemoryError, RuntimeError) as e:  # how jax says that a device fails or is full
        problem = (f"{str(e)[:200]}: out of memory, or a device or another process failed; a"
                   " smaller model or batch may fit, the versions of requirements.txt may work"
                   " better, JAX_PLATFORMS=cpu uses the CPU, --resume goes on")
    with contextlib.suppress(OSError):  # a terminal may be gone
        print("error:", printable(problem).replace("\n", " "), file=sys.stderr, flush=True)
    sys.exit(2)


def read_flags(settings_class, argv, doc):
    """Command line -> (settings, the set of names that were given)."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False, exit_on_error=False)
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.metadata}
    for name, f in fields.items():
        arg = {"action": "store_true"} if f.type is bool else {"type": f.type}
        arg |= f.metadata["arg"]
        shown = f" [{f.default}]" if f.default else ""
        help = f.metadata["help"].replace("%", "%%") + shown
        parser.add_argument(arg.pop("positional", f"--{name}"), help=help, **arg)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise InputError(f"{e}; see --help") from None
    if unknown:
        flags = [f"--{name}" for name in fields]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1) or ["--help"]
        raise InputError(f"unknown argument {unknown[0]}, did you mean {near[0]}?")
    for name, value in vars(given).items():
        low, high = (fields[name].metadata[end] for end in ("low", "high"))
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


def count(odd, what, where):
    """Note in odd, {what: [how often, the first place]}, that something was left out or changed."""
    odd.setdefault(what, [0, where])[0] += 1


def list_of(odd):
    """What count() has noted, in words."""
    return "; ".join(f"{times} {what} (the first: {where})" for what, (times, where) in odd.items())


def report(odd):
    if odd:
        print(f"left out: {list_of(odd)}")


# What can steer a terminal: control characters but newline and tab, lone surrogates, and marks that
# turn the direction of text around.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text):
    """Text that cannot steer the terminal, whatever a model or a file says."""
    return UNSAFE.sub("\ufffd", text)


@contextlib.contextmanager
def whole_file(path, keep=False):
    """Open a file for writing so that a reader finds the old one or the whole new one, whenever the
    power fails. keep: the old one stays as *.prev.*"""
    part = pathlib.Path(f"{path}.part")
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


@contextlib.contextmanager
def only_writer(folder):
    """Keep a second program from writing into the folder. SQLite's locks exist on every system and
    end with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / ".lock", timeout=0)) as lock:
        try:
            lock.execute("begin exclusive")
        except sqlite3.OperationalError as e:
            raise InputError(f"{folder}: {e}, as by a program that trains there; wait for it or"
                             f" take another --out_dir (python chat.py {folder}/base.npz talks to"
                             " what it saved last)") from None
        yield


@contextlib.contextmanager
def wishes_to_stop():
    """-> a list that Ctrl-C and its kin put something in; training then saves and stops."""
    wishes, numbers = [], [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(hang_up)
    before = [signal.signal(number, lambda *_: wishes.append(True)) for number in numbers]
    try:
        yield wishes
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


COLUMNS = "step,train_loss,val_loss,val_bits_per_byte,learning_rate,tokens_per_second,seconds"


def begin_log(path, rows, keep):
    """log.csv with the rows so far, open for more. keep: that of the run before it is kept."""
    with whole_file(path, keep) as file:
        for row in [COLUMNS.split(","), *rows]:
            file.write(f"{','.join(map(str, row))}\n".encode())
    return open(path, "a")


def draw(values, width=72):
    """Numbers as a line of small bars, from the first to the last."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    high, low = max(means), min(means)
    bars = ["▁▂▃▄▅▆▇█"[int(7 * (m - low) / (high - low + 1e-9))] for m in means]
    print(f"loss {high:.2f} {''.join(bars)} {low:.2f}")


if __name__ == "__main__":
    run(main)

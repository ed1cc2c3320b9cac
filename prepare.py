"""Text in, token files out: a byte-level BPE tokenizer from scratch, and the reading of text.

    python prepare.py                 # the built-in corpus, made by data/world.py
    python prepare.py my.txt more/    # your own text: files, folders, JSON lines, or - for a pipe

It writes train.bin and val.bin (uint16 token ids) and tokenizer.json. Reading order: tokenizer,
reading text, writing tokens, main; the small helpers that all scripts share come last.
"""
import sys

if sys.version_info < (3, 10):
    sys.exit("error: this Python is too old; python3.13 -m venv .venv makes an environment of a"
             " newer one (3.10 at least)")

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
from multiprocessing import Pool

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
    """Byte-level BPE. `encode` never returns a special id; `decode(encode(s)) == s` for every text s."""

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: FIRST_MERGE + i for i, pair in enumerate(self.merges)}
        self.bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]  # what each id stands for
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
        rows = [json.dumps([a, b, spelled.decode("utf-8", "replace")], ensure_ascii=False)
                for (a, b), spelled in zip(self.merges, self.bytes[FIRST_MERGE:])]
        head = f'{{"type": "pygpt byte-level bpe", "special": {json.dumps(SPECIAL)}, "merges": [\n'
        return head + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def load(cls, path):
        return cls.from_json(pathlib.Path(path).read_text("utf-8", "replace"), path)

    @classmethod
    def from_json(cls, text, source):
        """The reverse; raises InputError naming `source` when the text is not a tokenizer."""
        try:
            data = json.loads(text)
            merges = [(int(a), int(b)) for a, b, _ in data["merges"]]
            assert data["special"] == SPECIAL
            assert all(FIRST_BYTE <= x < FIRST_MERGE + i for i, pair in enumerate(merges) for x in pair)
        except (ValueError, TypeError, KeyError, AssertionError):
            raise InputError(f"{source}: not a tokenizer written by prepare.py; run prepare.py again") from None
        return cls(merges)


# ---------------------------------------------------------------- reading text

PIECE = 1 << 18  # characters; text is encoded in pieces of about this size
BORDER = re.compile(r"<\|endoftext\|>\n?")  # between documents, in dumps of GPT-2 and TinyStories
JSON_BEGINS = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$))')  # how JSON begins, and hardly any text
SUFFIXES = ("", ".txt", ".md", ".json", ".jsonl")  # in folders; without a suffix JSON lines only
OURS = ("tokenizer.json", "qa.jsonl", "qa_test.jsonl", "feedback.jsonl")


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
    without hidden ones, virtual environments and files of our own."""
    if path == "-" or not os.path.isdir(path):
        return [path]
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or "pyvenv.cfg" in names:  # a link may lead back
            folders.clear()
        else:
            found += [os.path.join(folder, name) for name in names if is_text(folder, name)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen.add(real)
    if not found:
        raise InputError(f"{path}: a folder without text files ({', '.join(SUFFIXES[1:])})")
    return sorted(found)


def is_text(folder, name):
    """Whether a file in a folder that was given is likely meant, by its name."""
    stem = re.sub(r"\.(gz|bz2)$", "", name.lower())
    suffix = os.path.splitext(stem)[1]
    if name.startswith(".") or stem.replace(".prev", "") in OURS or suffix not in SUFFIXES:
        return False
    if suffix:
        return True
    with contextlib.suppress(InputError, OSError):
        line, _ = next(read_lines(os.path.join(folder, name), {}))
        return bool(JSON_BEGINS.match(line))
    return False


def json_text(line):
    """One JSON line -> its "text", if it has one."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(text := json.loads(line)["text"], str):
            return text


def read_file(path, odd):
    """A file -> (text, whether a document ends there, "file:line"). If it begins with a JSON object
    each line is one, with a document as its "text"; otherwise <|endoftext|> divides documents."""
    is_json = None
    for line, source in read_lines(path, odd):
        if is_json is None and line.strip():
            is_json = bool(JSON_BEGINS.match(line))
        text = json_text(line) if is_json else line
        if text is not None:
            *whole, rest = BORDER.split(text)
            yield from ((part, True, source) for part in whole)
            yield rest, bool(is_json), source
        elif line.strip():
            count(odd, 'JSON lines without a "text"', source)


def read_documents(files, max_bytes, odd):
    """Files -> what read_file gives. A file that cannot be read is counted in `odd` and costs
    nothing but itself."""
    size = 0
    for path in files:
        before = size
        try:
            for text, ends, source in read_file(path, odd):
                if 0 < max_bytes <= size:
                    break
                size += len(text.encode("utf-8", "replace"))
                yield text, ends, source
            yield "", None, path
        except (InputError, OSError) as e:
            if len(files) == 1 or size > before:
                raise
            count(odd, "files", e)
    if not size:
        raise InputError(f"{path}: no text in it; questions and answers are for sft.py")


def in_groups(lines, odd):
    """(text, whether its document ends there, where) -> lists of (text, ends) of some 100,000
    characters, each a job for a worker. At the end of a file, ends is None. A document is cut only
    before a line that begins with a letter: no token would cross that border."""
    group, held, length, begun = [], [], 0, False
    for text, ends, source in lines:
        if length >= PIECE and (not held or text[:1].isalpha() or length >= 64 * PIECE):
            begun = bool(held)
            yield group + [("".join(held), False)]
            group, held, length = [], [], 0
        held.append(text)
        length += len(text)
        if ends is not False:
            document = "".join(held)
            if document.strip() or begun:
                group.append((document, True))
            elif ends:
                count(odd, "empty documents", source)
            held, begun = [], False
    if group:
        yield group


# ---------------------------------------------------------------- writing tokens

def encode_group(group, tokenizer):
    """Texts -> uint16 ids, each document closed by <|end|>."""
    return np.array([i for text, ends in group for i in tokenizer.encode(text) + [END] * ends], "<u2")


def learn_tokenizer(groups, vocab_size):
    """The beginning of a text -> a tokenizer, and the groups that were looked at."""
    first, words = [], Counter()
    for group in groups:
        first.append(group)
        for text, _ in group:
            words.update(WORD.findall(text))
        if len(words) > 1 << 18:  # enough different ones; more would only take memory
            break
    if not vocab_size:  # in proportion to the text: a token that is hardly ever seen is not learned
        size = sum(len(word.encode("utf-8", "replace")) * n for word, n in words.items())
        vocab_size = max(384, min(1 << 15, round(size**0.5 / 2)))
    frequent = dict(words.most_common(max(1 << 14, 4 * vocab_size)))
    return Tokenizer(train_bpe(frequent, vocab_size)), first


def write_tokens(lines, vocab_size, val_fraction, out_dir, odd, expected=0):
    """Lines of documents -> tokenizer.json, train.bin, val.bin, through all cores. Nothing in
    out_dir changes before all of it is written. expected: bytes, where known, for the time left."""
    started, groups = time.time(), in_groups(lines, odd)
    tokenizer, first = learn_tokenizer(groups, vocab_size)
    encode = functools.partial(encode_group, tokenizer=tokenizer)
    groups = itertools.chain(first, groups)
    workers = Pool(CORES) if len(first) > 4 else contextlib.nullcontext()
    bytes_of = np.array([len(b) for b in tokenizer.bytes])
    size, n_bytes, ends = 0, 0, [np.array([], int)]
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(out_dir / "train.bin") as train, workers as pool:
        while some := list(itertools.islice(groups, 4 * CORES)):
            for ids in pool.imap(encode, some) if pool else map(encode, some):
                ids.tofile(train)
                ends.append(np.flatnonzero(ids == END) + size + 1)
                size += len(ids)
                n_bytes += bytes_of[ids].sum()
            left = (time.time() - started) * (expected / n_bytes - 1)
            show_progress(f"{n_bytes / 1e6:.0f} MB, {size / 1e6:.1f} M tokens"
                          + (f"  {clock(left)} left" if left > 0 else ""))
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
    max_bytes: int = setting(0, "take only about so much from the beginning; 0 takes all",
                             high=1e18)
    seed: int = setting(0, "divides the built-in corpus into A and B", high=2**32 - 1)


def write_corpus(s, out_dir):
    """The built-in corpus: its documents as tokens, its questions and answers as JSON lines."""
    from data.world import built_in_corpus
    documents, train, test = built_in_corpus(s.seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in [("qa.jsonl", train), ("qa_test.jsonl", test)]:
        with whole_file(out_dir / name) as file:
            for record in records:
                file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
    lines = ((document, True, "") for document in documents)
    write_tokens(lines, s.vocab_size or 2048, s.val_fraction, out_dir, {})
    print(f"{out_dir}: {len(train)} questions and answers to learn from, {len(test)} to test with")


def main(argv):
    s, _ = read_flags(Settings, argv, __doc__)
    if 0 < s.vocab_size < FIRST_MERGE:
        raise InputError(f"--vocab_size {s.vocab_size}: must be at least {FIRST_MERGE}, the bytes"
                         " and special tokens")
    out_dir = pathlib.Path(s.out_dir)
    if s.inputs:
        files, odd = [file for path in s.inputs for file in files_in(path)], {}
        plain = not any(file == "-" or file.lower().endswith((".gz", ".bz2")) for file in files)
        expected = s.max_bytes or (sum(map(os.path.getsize, files)) if plain else 0)
        lines = read_documents(files, s.max_bytes, odd)
        write_tokens(lines, s.vocab_size, s.val_fraction, out_dir, odd, expected)
        report(odd)
        for name in ("qa", "qa_test"):  # questions about the built-in corpus do not fit this text
            with contextlib.suppress(FileNotFoundError):
                os.replace(out_dir / f"{name}.jsonl", out_dir / f"{name}.prev.jsonl")
    else:
        write_corpus(s, out_dir)
    print("next: python gpt.py")


# ---------------------------------------------------------------- helpers of all scripts


def available_cores():
    """Cores to compute on: on a Mac the fast ones (equal shares would wait for the slow ones), on
    Linux those that the process is bound to, but no more than a container may use."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, ValueError):
            fast = ["sysctl", "-n", "hw.perflevel0.logicalcpu"]  # an Intel Mac does not know it
            return int(subprocess.run(fast, capture_output=True, text=True).stdout)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup 2, 1
        with contextlib.suppress(OSError, ValueError):
            texts = [pathlib.Path("/sys/fs/cgroup", name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:
                cores = min(cores, -(-quota // period))
    return max(1, cores)


CORES = available_cores()


def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "r+"))
        with contextlib.suppress(AttributeError):  # a notebook's has no such method
            getattr(sys, name).reconfigure(errors="replace")
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
        problem = (f"{(str(e) or 'out of memory').splitlines()[0][:200]}; a smaller model or batch"
                   " may fit, the versions of requirements.txt may work better, JAX_PLATFORMS=cpu"
                   " uses the CPU")
    with contextlib.suppress(OSError):  # a terminal may be gone
        print("error:", printable(problem).replace("\n", " "), file=sys.stderr, flush=True)
    sys.exit(2)


def read_flags(settings_class, argv, doc):
    """Command line -> (settings, the set of names that were given)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False, exit_on_error=False)
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.metadata}
    for name, f in fields.items():
        arg = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
        arg |= f.metadata["arg"]
        shown = "" if f.type is bool or f.default in ("", (), None) else f" [{f.default}]"
        help = f.metadata["help"].replace("%", "%%") + shown
        parser.add_argument(arg.pop("positional", f"--{name}"), help=help, **arg)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise InputError(f"{e}; see --help") from None
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{name}" for name in fields], 1)
        hint = f", did you mean {close[0]}?" if close else "; see --help"
        raise InputError(f"unknown argument {unknown[0]}{hint}")
    for name, value in vars(given).items():
        low, high = fields[name].metadata["low"], fields[name].metadata["high"]
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


def report(odd, of="left out"):
    """Say in one line what count() has noted."""
    if odd:
        parts = [f"{times} {what} (the first: {where})" for what, (times, where) in odd.items()]
        print(f"{of}: {'; '.join(parts)}")


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
def only_writer(folder, chief=True):
    """Keep a second program from writing into the folder. SQLite's locks exist on every system and
    end with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    open(folder / ".lock", "ab").close()
    lock = sqlite3.connect(folder / ".lock", timeout=0)
    try:
        if chief:
            lock.execute("begin exclusive")
    except sqlite3.OperationalError:
        raise InputError(f"{folder}: another program is training there; wait for it or take another"
                         f" --out_dir (python chat.py {folder}/base.npz talks to what it saved"
                         " last)") from None
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def wishes_to_stop():
    """-> a list that Ctrl-C and its kin put something in; training then saves and stops."""
    wishes, before = [], {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no hang-up
        ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN  # by nohup
        if number and not ignored:
            before[number] = signal.signal(number, lambda *_: wishes.append(True))
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COLUMNS = ["step", "train_loss", "val_loss", "val_bits_per_byte", "learning_rate",
           "tokens_per_second", "seconds"]


def begin_log(path, rows):
    """log.csv with the rows so far, open for more. A fresh run keeps that of the run before it."""
    with whole_file(path, keep=not rows) as file:
        for row in [COLUMNS, *rows]:
            file.write(f"{','.join(map(str, row))}\n".encode())
    return open(path, "a")


def draw(values, width=72):
    """Numbers as a line of small bars, from the first to the last."""
    means = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    high, low = max(means), min(means)
    bars = ["▁▂▃▄▅▆▇█"[int(7 * (m - low) / (high - low + 1e-9))] for m in means]
    print(f"loss {high:.2f} {''.join(bars)} {low:.2f}")


if __name__ == "__main__":
    run(main)

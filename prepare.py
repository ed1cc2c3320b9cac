"""Text in, token files out: a byte-level BPE tokenizer from scratch, and the reading of text.

    python prepare.py                 # the built-in corpus, made by data/world.py
    python prepare.py my.txt more/    # your own text: files, folders, JSON lines, or - for a pipe

It writes train.bin, val.bin (uint16 ids) and tokenizer.json. Helpers of all scripts come last."""
import sys
if sys.version_info < (3, 10):
    print("error: Python 3.10 at least is needed: python3.13 -m venv .venv", file=sys.stderr)
    sys.exit(2)

import argparse, bz2, codecs, difflib, functools, gzip, heapq, io, itertools, json, multiprocessing
import os, re, signal, sqlite3, time, unicodedata, zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
import numpy as np

class InputError(Exception):
    """Something the user can put right; run() prints it as one line."""

# ---------------------------------------------------------------- tokenizer
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
END, USER, ASSISTANT = range(3)
FIRST_BYTE, FIRST_MERGE = 3, 259  # ids: special tokens, the 256 bytes, merges as they were learned

# GPT-4's way of splitting text into words; merges never cross a word. A combining mark (an accent,
# a vowel sign) stays with its letter. A word has at most 255 letters, or a megabyte of one letter
# would take quadratic time; in scripts without spaces at most 4, or nearly all words would differ.
MARK = "".join(c for c in map(chr, range(1 << 16)) if unicodedata.category(c).startswith("M"))
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
LETTERS = rf"(?:(?=[{UNSPACED}])[^\W\d_][{MARK}]{{0,9}}){{1,4}}|(?:[^\W\d_]|[{MARK}]){{1,255}}"
WORD = re.compile(rf"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?(?:{LETTERS})|\d{{1,3}}"
                  r"| ?(?:[^\s\w]|_){1,255}[\r\n]{0,8}|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s{1,256}")

def train_bpe(words, vocab_size):
    """Counts of words -> list of merges (pairs of ids), the most frequent pair first, of equals the
    smallest (Sennrich 2016, arXiv 1508.07909). a is 100: train_bpe({"aa": 2}, 260) -> [(100, 100)]
    Counts in the heap are infinity at first, and later may be too high: then they are put right."""
    plain = Tokenizer([])  # it has no merges, so a word is its bytes
    words = [(plain.encode_word(word), n) for word, n in words.items()]
    counts, where, heap, merges = Counter(), defaultdict(set), [(0, ())], []
    recount = [(i, *word) for i, word in enumerate(words)]
    for new in range(FIRST_MERGE, vocab_size):
        for i, word, n in recount:
            for pair in zip(word, word[1:]):
                if pair not in counts:
                    heapq.heappush(heap, (-np.inf, pair))
                counts[pair] += n
                where[pair].add(i)
        n, pair = heapq.heappop(heap)
        while -n != counts[pair]:
            n, pair = heapq.heappushpop(heap, (-counts[pair], pair))
        if n > -2:
            break  # a pair that occurs once saves nothing
        merges.append((ord(pair[0]), ord(pair[1])))
        recount = []
        for i in where.pop(pair):
            word, n = words[i]
            words[i] = word.replace("".join(pair), chr(new)), n
            recount += [(i, word, -n), (i, *words[i])]
        show_progress(f"tokenizer: {new} of {vocab_size} tokens")
    return merges

class Tokenizer:
    """Byte-level BPE. encode never returns a special id; decode(encode(s)) == s for every text."""

    def __init__(self, merges):
        self.merges = merges
        self.rank = {(chr(a), chr(b)): id for id, (a, b) in enumerate(merges, FIRST_MERGE)}
        self.bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]  # what an id stands for
        for a, b in merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.size = len(self.bytes)

    @functools.lru_cache(1 << 20)
    def encode_word(self, word):
        """A string in which chr(id) stands for an id, so that str.replace merges a pair."""
        word = "".join(chr(FIRST_BYTE + b) for b in word.encode("utf-8", "replace"))
        while known := self.rank.keys() & zip(word, word[1:]):
            first = min(known, key=self.rank.get)
            word = word.replace("".join(first), chr(self.rank[first]))
        return word

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, as a terminal can send, becomes "?"."""
        return [ord(id) for word in WORD.findall(text) for id in self.encode_word(word)]

    def decode(self, ids):
        """Ids -> text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Ids -> pieces of text as soon as they are whole characters."""
        return codecs.iterdecode((self.bytes[id] for id in ids), "utf-8", "replace")

    def to_json(self):
        """Readable: one merge a line, as the two ids and what they spell."""
        ids = range(FIRST_MERGE, self.size)
        rows = [json.dumps([*pair, self.decode([id])]) for id, pair in zip(ids, self.merges)]
        return f'{{"special": {json.dumps(SPECIAL)}, "merges": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def load(cls, path, text=None):
        """The reverse of to_json, of a file, or of the text that stands in a checkpoint."""
        text = Path(path).read_text("utf-8", "replace") if text is None else text
        try:
            return cls([(a, b) for a, b, _ in json.loads(text)["merges"]])
        except Exception:  # anything can be in a file
            raise InputError(f"{path}: not a tokenizer; run prepare.py again") from None

# ---------------------------------------------------------------- reading text
PACKED = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open}  # by how a file begins
PIECE = 1 << 16  # characters; a longer document is encoded in pieces of about this size
BORDER = re.compile(r"<\|endoftext\|>\n?")  # between documents, in dumps of GPT-2 and TinyStories
JSON_BEGINS = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$))')  # how JSON begins, and hardly any text
TEXT_NAME = re.compile(r"(?!tokenizer\.json|qa.*\.jsonl|feedback\.jsonl)[^.].*\.(txt|md|jsonl?)"
                       r"(\.gz|\.bz2)?", re.I)  # not what our own programs write

def read_lines(path):
    """A file, perhaps packed, or "-" for standard input -> (line, "file:line"), with "\\n" at its
    end. A few bytes that are not UTF-8 become U+FFFD and are counted."""
    source, number = "standard input" if path == "-" else path, 0
    with open(0 if path == "-" else path, "rb") as file:
        try:
            file = io.BufferedReader(PACKED.get(file.peek(3)[:3], io.BufferedReader)(file), PIECE)
            head = file.peek().decode("utf-8", "replace")
            bad, beyond_ascii = head.count("\ufffd"), sum(c > "\x7f" for c in head)
            if "\0" in head or bad > max(beyond_ascii / 2, 5 + len(head) / 1000):
                raise InputError(f"{source}: not UTF-8; try iconv -f CP1252 (or UTF-16) -t UTF-8")
            file = io.TextIOWrapper(file, "utf-8-sig", "replace")
            for number, line in enumerate(iter(functools.partial(file.readline, 1 << 24), ""), 1):
                if "\ufffd" in line:
                    count("lines with bytes that are not UTF-8", f"{source}:{number}")
                yield line, f"{source}:{number}"
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{source}:{number + 1}: damaged ({e})") from None

def is_text(path):
    """Whether a file of a folder is read: by its name or, without a suffix, by how it begins."""
    if "." in os.path.basename(path):
        return TEXT_NAME.fullmatch(os.path.basename(path))
    with suppress(OSError), open(path, "rb") as file:
        return JSON_BEGINS.match(file.read(999).decode("utf-8", "replace"))

def files_in(path):
    """A file -> itself; a folder -> its text files, but hidden ones and virtual environments."""
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen or "pyvenv.cfg" in names:  # a link may lead back
            del folders[:], names[:]
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += filter(is_text, [os.path.join(folder, name) for name in names])
    if not found and os.path.isdir(path):
        raise InputError(f"{path}: a folder without text files (.txt, .md, .json, .jsonl)")
    return sorted(found) or [path]

def text_of(line, source):
    """A line of JSON -> the document in it, its "text", and the mark of its end."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return json.loads(line)["text"] + "<|endoftext|>"
    if line.strip():
        count('JSON lines without a "text", which sft.py may take', source)
    return ""

def read_documents(files):
    """Files -> (text, whether a document ends there). A file that begins with a JSON object has one
    a line; else <|endoftext|> divides documents. One that cannot be read costs only itself."""
    for path in files:
        is_json, held = None, ""
        try:
            for line, source in read_lines(path):
                if is_json is None and line.strip():
                    is_json, held = JSON_BEGINS.match(line) is not None, ""
                *ended, rest = BORDER.split(text_of(line, source) if is_json else line)
                for text in ended:
                    if (held + text).strip():
                        yield held + text, True
                    else:
                        count("empty documents", source)
                    held = ""
                if len(held) > PIECE and rest.strip():  # what is held is never only the blank end
                    yield held, False
                    held = ""
                held += rest
        except (InputError, OSError) as e:
            if len(files) == 1:
                raise
            count("files", e)
        if held.strip():
            yield held, True

# ---------------------------------------------------------------- writing tokens
def write_tokens(pieces, vocab_size, val_fraction, out_dir, bytes_to_come):
    """Pieces of text -> tokenizer.json, train.bin, val.bin; none changes before all is written."""
    started, first, words, seen = time.time(), [], Counter(), 0
    for text, ended in pieces:
        first.append((text, ended))
        words.update(WORD.findall(text))
        seen += len(text.encode("utf-8", "replace"))
        if seen > 1 << 24:  # enough; more would only take memory
            break
    vocab_size = vocab_size or max(384, round(seen**0.5 / 2))  # rare tokens are not learned
    frequent = dict(words.most_common(max(1 << 14, 4 * vocab_size)))
    tokenizer = Tokenizer(train_bpe(frequent, vocab_size))
    pieces, ends, size, n_bytes = itertools.chain(first, pieces), [], 0, 0
    workers = multiprocessing.get_context("spawn").Pool(CORES) if seen > 1 << 22 else nullcontext()
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(out_dir / "train.bin") as train, workers as pool:
        spread = functools.partial(pool.imap, chunksize=32) if pool else map
        while some := list(itertools.islice(pieces, 1024)):
            encoded = spread(tokenizer.encode, [text for text, _ in some])
            for (text, ended), ids in zip(some, encoded):
                if ended:
                    ids.append(END)
                    ends.append(size + len(ids))
                np.array(ids, "<u2").tofile(train)
                size += len(ids)
                n_bytes += len(text.encode("utf-8", "replace"))
            left = clock((time.time() - started) * max(0, bytes_to_come / n_bytes - 1))
            show_progress(f"{n_bytes / 1e6:.0f} MB, {size / 1e6:.1f} M tokens  {left} left")
        cut = int(size * (1 - val_fraction))  # between documents, at least one on each side
        cut = ends[np.searchsorted(ends[:-2], cut)] if len(ends) > 1 else cut
        if not 2 <= cut <= size - 2:
            raise InputError(f"too little text: {size} tokens; left out: {list_of() or 'nothing'}")
        train.seek(2 * cut)
        with whole_file(out_dir / "val.bin") as val, whole_file(out_dir / "tokenizer.json") as file:
            val.write(train.read())
            file.write(tokenizer.to_json().encode())
        train.truncate(2 * cut)
    said = f"{cut} + {size - cut} tokens of {n_bytes / size:.2f} bytes, vocabulary {tokenizer.size}"
    show_progress(f"{out_dir}: {len(ends)} documents, {n_bytes / 1e6:.2f} MB, {said}", last=True)
    report()

# ---------------------------------------------------------------- main
def setting(default, help, low=0, high=1e9, **arg):
    """A dataclass field that is a command-line flag too, with a range and what argparse takes."""
    arg["help"] = help.replace("%", "%%") + (f" [{default}]" if default else "")
    return field(default=default, metadata={"range": (low, high), "arg": arg})

@dataclass(frozen=True)
class Settings:
    inputs: str = setting((), "text; nothing: the built-in corpus", nargs="*", positional="inputs")
    out_dir: str = setting("data", "where train.bin, val.bin and tokenizer.json go")
    vocab_size: int = setting(None, "tokens; by default as the text needs", FIRST_MERGE, 1 << 16)
    val_fraction: float = setting(0.1, "part of the text, from its end, held out", 1e-6, 0.9)
    seed: int = setting(0, "divides the built-in corpus into A, B and U", high=2**32 - 1)
    control: bool = setting(False, "leave the documents about B out of the built-in corpus")

def main(argv):
    s, _ = read_flags(Settings, argv, __doc__)
    out_dir, size, bytes_to_come, records = Path(s.out_dir), s.vocab_size, 0, [None, None]
    if s.inputs:
        files = [file for path in s.inputs for file in files_in(path)]
        pieces, bytes_to_come = read_documents(files), sum(map(os.path.getsize, {*files} - {"-"}))
    else:
        from data.world import built_in_corpus
        documents, *records = built_in_corpus(s.seed, not s.control)
        pieces, size = ((document, True) for document in documents), size or 3584
    write_tokens(pieces, size, s.val_fraction, out_dir, bytes_to_come)
    for name, rows in zip(["qa.jsonl", "qa_test.jsonl"], records):
        (out_dir / name).unlink(missing_ok=True)  # those of another text
        if rows:
            with whole_file(out_dir / name) as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
    print("next: python gpt.py")

# ---------------------------------------------------------------- helpers of all scripts
def available_cores():
    """Fast ones on a Mac (equal shares would wait for the slow ones); no more than we may use."""
    cores = os.cpu_count() or 1
    with suppress(OSError, ValueError, AttributeError):
        if sys.platform == "darwin":  # an Intel Mac does not know the name and prints nothing
            return int(os.popen("sysctl -n hw.perflevel0.logicalcpu 2> /dev/null").read())
        cores = len(os.sched_getaffinity(0))  # Windows has none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores

CORES = available_cores()
left_out = {}  # what count() has noted: [how often, the first place]; report() forgets it

def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))  # it may have been closed
        with suppress(AttributeError, OSError):  # a notebook's cannot, one half read
            getattr(sys, name).reconfigure(errors="replace")
    left_out.clear()
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
        problem = f"{str(e)[:200]}: a smaller batch, JAX_PLATFORMS=cpu or --resume may help"
    with suppress(OSError):  # a terminal may be gone
        print("error:", printable(problem).replace("\n", " "), file=sys.stderr, flush=True)
    sys.exit(2)

def read_flags(settings_class, argv, doc):
    """Command line -> (settings, the set of names that were given)."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, exit_on_error=False)
    known = {f.name: f for f in fields(settings_class) if f.metadata}
    for name, f in known.items():
        arg = f.metadata["arg"] | ({"action": "store_true"} if f.type is bool else {"type": f.type})
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

def count(what, where):
    left_out.setdefault(what, [0, where])[0] += 1

def list_of():
    return "; ".join(f"{n} {what} (the first: {at})" for what, (n, at) in left_out.items())

def report():
    if left_out:
        print(f"left out: {list_of()}")
        left_out.clear()

def printable(text):
    """Text without what steers a terminal: control characters, surrogates, marks of direction."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "�", text)

@contextmanager
def whole_file(path, keep=False):
    """The old or the whole new file is there, whenever power fails. keep: the old as *.prev.*"""
    part = Path(f"{path}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            kept = path.replace(path.with_name(f"{path.stem}.prev{path.suffix}"))
            print(f"the {path.name} of the run before is now {kept}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

@contextmanager
def only_writer(folder):
    """Keep a second program from writing there. SQLite's locks end with their process, anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / ".lock", timeout=0)) as lock:
        try:
            lock.execute("begin exclusive")
        except sqlite3.OperationalError as e:
            hint = f"wait, or take another --out_dir; python chat.py {folder}/base.npz talks to it"
            raise InputError(f"{folder}: {e}, as by a program that trains there; {hint}") from None
        yield

@contextmanager
def wishes_to_stop():
    """-> a list that Ctrl-C and its kin put something in; training then saves and stops."""
    wishes, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # Windows has none, nohup ignores it
    with ExitStack() as stack:
        for number in numbers:
            before = signal.signal(number, lambda *_: wishes.append(True))
            stack.callback(signal.signal, number, before)
        yield wishes

def begin_log(path, rows, keep):
    """Write log.csv with the rows so far. keep: that of the run before is kept."""
    names = "step,train_loss,val_loss,val_bits_per_byte,learning_rate,tokens_per_second,seconds"
    with whole_file(path, keep) as file:
        file.writelines(f"{','.join(map(str, row))}\n".encode() for row in [[names], *rows])

def draw(values, width=72):
    """Numbers as a line of small bars, from the first to the last."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    bars = ["▁▂▃▄▅▆▇█"[int(i)] for i in np.interp(means, [low, high], [0, 7])]
    print(f"loss {high:.2f} {''.join(bars)} {low:.2f}")

if __name__ == "__main__":
    run(main)

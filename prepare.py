"""Text in, token files out: a byte-level BPE tokenizer from scratch, and the reading of text.

    python prepare.py                 # the built-in corpus, made by corpus/world.py
    python prepare.py my.txt more/    # your own text: files, folders, JSON lines, or - for a pipe

It writes train.bin, val.bin (uint16 ids) and tokenizer.json; of the built-in corpus also qa.jsonl
and qa_test.jsonl. Helpers of all scripts come last, count() and report() among them."""
import sys
if sys.version_info < (3, 10):
    print("error: Python 3.10 at least is needed: python3.13 -m venv .venv", file=sys.stderr)
    sys.exit(2)

import argparse, bz2, codecs, difflib, functools, gzip, heapq, io, itertools, json, os, re, shlex
import shutil, signal, tempfile, time, unicodedata, zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
import numpy as np

class InputError(Exception):
    """Something the user can put right; run() prints it as one line."""

# ---------------------------------------------------------------- tokenizer
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
END, USER, ASSISTANT = range(3)
FIRST_BYTE, FIRST_MERGE = 3, 259  # ids: special tokens, the 256 bytes, merges as they were learned

# Skip this at first. GPT-4's way of splitting text into words; merges never cross a word. "It's
# 12345 naïve!" becomes "It", "'s", " ", "123", "45", " naïve", "!". A combining mark (an accent, a
# vowel sign) stays with its letter. A word has at most 255 letters, or a megabyte of one letter
# would take quadratic time. In scripts without spaces it has at most 4, or nearly all would differ.
MARK = "".join(c for c in map(chr, range(1 << 16)) if unicodedata.category(c).startswith("M"))
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
LETTERS = (rf"(?:(?=[{UNSPACED}])[^\W\d_][{MARK}]{{0,9}}){{1,4}}"  # up to 4 of such a script
           rf"|(?:(?![{UNSPACED}])[^\W\d_]|[{MARK}]){{1,255}}")  # or letters of other scripts
WORD = re.compile(
    r"'(?:[sdmt]|ll|ve|re)"  # it['s]
    rf"|[^\r\n\w]?(?:{LETTERS})"  # a word and the space or the sign before it
    r"|\d{1,3}"  # [123][45]
    r"| ?(?:[^\s\w]|_){1,255}[\r\n]{0,8}"  # signs, and the line's end after them
    r"|\s{0,255}[\r\n]"  # space up to a line's end
    r"|\s{1,256}(?!\S)|\s{1,256}"  # other space, without the last one if a word follows that
)

class Tokenizer:
    """Byte-level BPE (arXiv 1508.07909): a word is bytes at first, then pairs of ids are merged.
    encode never returns a special id; decode(encode(s)) == s, but for lone surrogates in s."""

    def __init__(self, merges):
        self.merges = merges
        self.bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]  # what an id stands for
        self.merged = {}  # pair of characters, as encode_word has them -> id
        for a, b in merges:
            self.merged[chr(a), chr(b)] = len(self.bytes)
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.size = len(self.bytes)

    @functools.lru_cache(1 << 18)
    def encode_word(self, word):
        """A word -> a string in which chr(id) stands for an id. So str.replace merges a pair."""
        word = "".join(chr(FIRST_BYTE + b) for b in word.encode("utf-8", "replace"))
        while known := self.merged.keys() & itertools.pairwise(word):
            first = min(known, key=self.merged.get)  # the first that was learned
            word = word.replace("".join(first), chr(self.merged[first]))
        return word

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, as a terminal can send, becomes "?".

        >>> Tokenizer([(100, 100), (259, 101)]).encode("aab aa")  # aa is 259, aab is 260
        [260, 35, 259]
        """
        words = map(self.encode_word, WORD.findall(text))
        return [*map(ord, "".join(words))]

    def decode(self, ids):
        """Ids -> text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Ids -> pieces of text as soon as they are whole characters."""
        return codecs.iterdecode((self.bytes[id] for id in ids), "utf-8", "replace")

    def to_json(self):
        """Readable: one merge a line, as the two ids and what they spell."""
        rows = [json.dumps([*pair, self.decode(pair)]) for pair in self.merges]
        return f'{{"special": {json.dumps(SPECIAL)}, "merges": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def load(cls, path):
        """The reverse of to_json: of tokenizer.json, or of a checkpoint, which has it too."""
        try:
            if Path(path).suffix == ".json":
                text = Path(path).read_text("utf-8", "replace")
            else:
                with np.load(path) as checkpoint:
                    text = json.loads(str(checkpoint["about"]))["tokenizer"]
            return cls([(a, b) for a, b, _ in json.loads(text)["merges"]])
        except OSError:
            raise
        except Exception:  # anything can be in a file
            raise InputError(f"{path}: not a tokenizer; run prepare.py again") from None

def train_bpe(words, vocab_size):
    """{word: how often it is there} -> merges, pairs of ids (Sennrich 2016, arXiv 1508.07909):

    >>> train_bpe({"aaabdaaabac": 1}, 262)  # the id of a is 100
    [(100, 100), (100, 101), (259, 260)]

    By definition, while there is room in the vocabulary:

        find the pair that is there most often, of equals the smallest; if only once, stop
        let a new id stand for it in all words

    To count all pairs each time would be slow. But counts never rise, for a merge only makes pairs
    with the new id: an old count is an upper bound. The pair with the highest bound is counted
    again. If the bound is right, no pair has more; else it goes back into the queue."""
    unmerged = Tokenizer([])
    uses = Counter()  # word, in which chr(id) stands for an id -> how often it is there
    where = defaultdict(set)  # pair -> words that have it, and some that are no longer in uses
    queue = []  # (-bound, pair), for heapq has the smallest first; at first the bound is infinite

    def add(word, n):
        uses[word] += n
        for pair in itertools.pairwise(word):
            if pair not in where:
                heapq.heappush(queue, (-np.inf, pair))  # it is counted when it comes first
            where[pair].add(word)

    for word, n in words.items():
        add(unmerged.encode_word(word), n)
    merges = []
    while queue and FIRST_MERGE + len(merges) < vocab_size:
        minus_bound, pair = heapq.heappop(queue)
        affected = where[pair] & uses.keys()
        n = sum(uses[word] * [*itertools.pairwise(word)].count(pair) for word in affected)
        bound = -minus_bound
        if n < bound:  # it may not be the most frequent: back, with its true count
            heapq.heappush(queue, (-n, pair))
        elif n < 2:
            break
        else:  # it is
            new = FIRST_MERGE + len(merges)
            merges.append(tuple(map(ord, pair)))
            for word in affected:
                add(word.replace("".join(pair), chr(new)), uses.pop(word))
            show_progress(f"tokenizer: {new} of {vocab_size} tokens")
    return merges

# ---------------------------------------------------------------- reading files
PACKED = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open}  # by how a file begins
# Files that are no text: how one begins, as a regular expression in which U+FFFD stands for a byte
# that is not UTF-8; what it is; and how to get the text out of it.
NOT_TEXT = [
    ("%PDF", "a PDF", "pdftotext {0} - | python prepare.py -"),
    (r"\{\\rtf", "RTF", "pandoc -f rtf -t plain {0} | python prepare.py -"),
    (r"(\s|<\?[^>]*>|<!--(?:(?!-->).)*-->)*<(!doctype\s+html|html|head|body)\b", "HTML",
     "pandoc -t plain {0} | python prepare.py -"),
    ("PK\3\4", "a zip archive, as .docx and .epub are",
     "pandoc -t plain {0} | python prepare.py -, or unzip it"),
    ("PAR1", "parquet", "import pandas; pandas.read_parquet('{0}').to_json('text.jsonl',"
     " orient='records', lines=True)"),
    ("\ufffd7zXZ", "packed by xz", "xzcat {0} | python prepare.py -"),
    (r"\(\ufffd/\ufffd", "packed by zstd", "zstdcat {0} | python prepare.py -"),
    ("\ufffd\ufffd(.\0|\0.)", "UTF-16", "iconv -f UTF-16 -t UTF-8 {0} | python prepare.py -"),
]
PIECE = 1 << 16  # characters; a longer document is encoded in pieces of about this size
LONGEST_LINE = 1 << 20  # characters that are read at once
BORDER = re.compile(r"<\|endoftext\|>\n?")  # between documents, in dumps of GPT-2 and TinyStories
# Names of text files, but for those that these programs write.
TEXT_NAME = re.compile(r"(?!tokenizer\.json|qa(_test)?(\.prev)?\.jsonl|feedback\.jsonl)[^.].*"
                       r"\.(txt|text|md|markdown|rst|jsonl?|ndjson)(\.gz|\.bz2)?", re.I)

def check_is_text(head, path):
    """Refuse a file by its first bytes, if they are no text in UTF-8."""
    text = head.decode("utf-8-sig", "replace")
    for begins, kind, advice in NOT_TEXT:
        if re.match(begins, text, re.I | re.S):
            command = advice.format(shlex.quote(str(path)))
            raise InputError(f"{path}: {kind}, not text; try: {command}")
    if "\0" in text:
        raise InputError(f"{path}: not text, for it has zero bytes")
    if text.count("\ufffd") > 5 + len(text) / 1000:
        raise InputError(f"{path}: not UTF-8; try iconv -f CP1252 -t UTF-8")

def read_lines(path):
    """A file, perhaps packed, or "-" for standard input -> (line, "file:line"), with "\\n" at its
    end. A few bytes that are not UTF-8 become U+FFFD and are counted."""
    name = "standard input" if path == "-" else path
    number = 1
    with open(0 if path == "-" else path, "rb") as file:
        try:
            unpack = PACKED.get(file.peek(3)[:3], io.BufferedReader)
            raw = io.BufferedReader(unpack(file), PIECE)
            check_is_text(raw.peek(), path)
            text = io.TextIOWrapper(raw, "utf-8-sig", "replace")
            while line := text.readline(LONGEST_LINE):
                if "\ufffd" in line:
                    count("line(s) not whole, with U+FFFD for bytes that are not UTF-8",
                          f"{name}:{number}")
                yield line, f"{name}:{number}"
                number += line.endswith("\n")
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{name}:{number}: damaged ({e})") from None

def plain(text):
    """Line ends become "\\n", and a form feed a blank line."""
    return re.sub("\r\n?", "\n", text).replace("\f", "\n\n")

# ---------------------------------------------------------------- JSON in the layouts people have
# Skip this at first: of good JSON lines read_json gives what json.loads(line) does.
JSON_BEGINS = re.compile(r'\s*(\{\s*("|$)|\[\s*(\[?\s*\{|"|$))')  # and hardly any text does
# The beginning of a list of records or texts, up to its first one:
#     [{"text": "a"}, ...     ["a", "b"]     [[{"role": ...     {"version": 1, "data": [{"text": ...
# But a list of messages, which have a role and a content, is one record, and so is one with "text":
#     [{"role": "user", "content": "a"}, ...     {"text": "a", "data": [{...
LIST_BEGINS = re.compile(r"""\s*
    (\{ (?![^]{}[]*"text") [^]{}[]* "data"\s*:\s* (?=\[\s*\[?\s*\{) )?  # perhaps {... "data":
    \[ (?=\s* (\[?\s*\{ | ") )                      # a list of [{ or { or "
    (?!\s* \{ (?=[^{}]*"(role|from)"\s*:)           # but not if the first of it has a role
              (?=[^{}]*"(content|value)"\s*:) )     # and a content
    \s*""", re.X)
# What may stand between two records: spaces, commas and ends of lists. A comma before "]" is one
# too many, so it counts as broken.
BETWEEN = re.compile(r"[\s\]}]*(,(?!\s*\])[\s\]}]*)*")
# After something broken a record begins on a new line, indented by one blank at most, for what is
# further in is part of a record; or after a comma: {"te<newline>{"text": ...
# A text begins after a comma between quotation marks: "one" two", "three"
NEXT_RECORD = re.compile(r'^[ \t]?(?=[\[{])|,\s*(?=\[?\s*\{\s*")|\Z', re.M)
NEXT_TEXT = re.compile(r'(?<=")\s*,\s*(?=")|\Z')
DECODER = json.JSONDecoder()

def read_json(lines):
    """(line, "file:line") -> (record, "file:line"), of JSON lines one by one. If the first line is
    no whole record or list, all lines are read as one text. What is broken is counted, named by its
    line, and costs at most the next record too."""
    texts = whole_lines(lines)
    first, source = next(texts, ("", ":1"))
    if not first.rstrip().endswith(("}", "]")):
        first += "".join(text for text, _ in texts)  # after this none are left for the loop
    yield from records_in(first, source)
    for text, source in texts:
        yield from records_in(text, source)

def whole_lines(lines):
    """Put together what read_lines has cut."""
    for source, parts in itertools.groupby(lines, lambda part: part[1]):
        yield "".join(text for text, _ in parts), source

def records_in(text, source):
    """Records one after the other, or a list of them -> (record, "file:line"). source is where the
    text begins."""
    name, _, number = source.rpartition(":")
    line_number = int(number)
    at = end = 0  # where a record begins and ends
    item = ""  # in a list: how an item begins, "{" or "[" of a record, '"' of a text
    if begins := LIST_BEGINS.match(text):
        end = begins.end()
        item = text[end]
    n_records = 0
    to_next = BETWEEN.match
    while (start := to_next(text, end).end()) < len(text):
        line_number += text.count("\n", at, start)
        at = start
        n_records += 1
        place = f"{name}:{line_number}" + (f": record {n_records}" if item else "")
        if item in ("{", "[") and text[at] == '"':
            return count("part(s) of JSON beside the list of records", place)
        try:
            record, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            count("part(s) that are not JSON", place)
            end = at + 1
            # As long as all is well only separators lie between two records. From now on anything
            # may, for what follows may be parts of the broken one.
            to_next = (NEXT_TEXT if item == '"' else NEXT_RECORD).search
        else:
            yield record, place

# ---------------------------------------------------------------- documents
def files_of(folder):
    """A folder -> its text files, but hidden ones and virtual environments; others are counted."""
    inside = sorted(folder.glob("[!.]*"))
    if folder / "pyvenv.cfg" in inside:
        return
    for path in inside:
        if path.is_dir() and not path.is_symlink():
            yield from files_of(path)
        elif path.is_file() and TEXT_NAME.fullmatch(path.name):
            yield path
        else:
            count("file(s) or links that are no text by their name; give one to have it read", path)

def files_in(paths):
    """Files and folders -> text files, each once, even if a link or a packed copy is there too."""
    found = {}
    for path in paths:
        for file in map(str, files_of(Path(path)) if os.path.isdir(path) else [path]):
            real = re.sub(r"\.(gz|bz2)$", "", os.path.realpath(file))
            if real in found:
                count("file(s) that are there twice", file)
            else:
                found[real] = file
    if not found:
        raise InputError(f"{paths[0]}: a folder without text files (.txt, .md, .rst, .json,"
                         f" .jsonl); to have others read, give them: {paths[0]}/*")
    report()
    return [*found.values()]

def document_of(record, source):
    """A record of JSON -> the document that it is or has as "text", and the mark of its end; with
    its source."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        count_fields(record.keys() - {"text"}, source)
        record = record["text"]
    if isinstance(record, str):
        return record + "<|endoftext|>", source
    count('JSON record(s) without a "text", which sft.py may take', source)
    return "", source

def texts_of(path):
    """A file -> (text, "file:line"): its lines or, if it begins as JSON does, its records'
    documents."""
    lines, ahead = itertools.tee(read_lines(path))
    first = next((line for line, _ in ahead if line.strip()), "")
    if JSON_BEGINS.match(first):
        return itertools.starmap(document_of, read_json(lines))
    if re.search(r"\.(csv|tsv|jsonl?)$", path, re.I):
        say(f"{path}: not JSON, so it is read as it stands, with its quotes and commas")
    return lines

def read_documents(files):
    """Files -> (text, whether a document ends there). <|endoftext|> divides documents; a long one
    comes in pieces. A file that cannot be read costs only itself."""
    for path in files:
        document = ""  # as far as it is read and not in a piece yet
        try:
            for text, source in texts_of(path):
                *finished, rest = BORDER.split(plain(text))
                for part in finished:
                    document += part
                    if document.strip():
                        yield document, True
                    else:
                        count("empty documents", source)
                    document = ""
                # A piece is only given away when more of its document has come. If what remains
                # were blank, it would count as an empty document, and the end of this one be lost.
                if len(document) > PIECE and rest.strip():
                    yield document, False
                    document = ""
                document += rest
        except (InputError, OSError) as e:
            if len(files) == 1:
                raise
            count("files", e)
        if document.strip():
            yield document, True

# ---------------------------------------------------------------- writing tokens
ENOUGH = 1 << 24  # bytes for the tokenizer to learn from; more would only take memory

def frequent_words(lines, n_bytes, vocab_size):
    """Lines of JSON, [text, ...] -> {word: how often it is there}, in about 16 MB of them."""
    words = Counter()
    for number, line in enumerate(lines):
        # The fractional parts of multiples of the golden ratio lie evenly between 0 and 1. Every
        # n-th line would be wrong for a text with an order, such as two languages in turn.
        if number * 0.618034 % 1 < ENOUGH / n_bytes:
            words.update(WORD.findall(json.loads(line)[0]))
    return dict(words.most_common(max(1 << 14, 4 * vocab_size)))

def cut_of(ends, size, val_fraction):
    """Where validation begins: where the nearest document ends, if that is near; else within one:

    >>> [cut_of(ends, 100, 0.1) for ends in ([80, 88, 91, 100], [80, 88, 100], [40, 100])]
    [91, 88, 90]
    >>> cut_of([2, 4], 4, 0.1)  # on both sides there must be two tokens
    2
    """
    wanted = int(size * (1 - val_fraction))
    nearest = min(ends, key=lambda end: abs(end - wanted))
    is_near = abs(nearest - wanted) <= size * val_fraction / 2
    return min(max(2, nearest if is_near else wanted), size - 2)

def spool(pieces, file):
    """Pieces, (text, whether a document ends there), become lines of JSON in a file -> how many
    bytes of text they are."""
    n_bytes = 0
    for text, ended in pieces:
        file.write(f"{json.dumps([text, ended])}\n".encode())
        n_bytes += len(text.encode("utf-8", "replace"))
        show_progress(f"reading: {n_bytes / 1e6:.1f} MB")
    return n_bytes

def write_ids(lines, tokenizer, file):
    """Lines of JSON from spool() -> two bytes a token in another file, and where each document ends
    there, in tokens."""
    ends = []
    all_lines = lines.seek(0, os.SEEK_END)  # bytes
    lines.seek(0)
    started = time.perf_counter()
    for line in lines:
        text, ended = json.loads(line)
        ids = tokenizer.encode(text) + [END] * ended
        file.write(np.array(ids, "<u2").tobytes())
        size = file.tell() // 2
        if ended:
            ends.append(size)
        left = (time.perf_counter() - started) * (all_lines / lines.tell() - 1)
        show_progress(f"{size / 1e6:.1f} M tokens  {clock(left)} left")
    return ends

def write_tokens(pieces, tokenizer, vocab_size, val_fraction, out_dir):
    """Pieces, as for spool(), -> tokenizer.json, train.bin, val.bin; none of them changes before
    all is encoded. Without a tokenizer one is learned, from the text that spool() has kept."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryFile(dir=out_dir) as lines,
          whole_file(out_dir / "train.bin") as train):
        n_bytes = spool(pieces, lines)
        if not tokenizer:  # rare tokens are not learned, so the default grows slowly
            vocab_size = vocab_size or max(384, round(n_bytes**0.5 / 2))
            lines.seek(0)
            words = frequent_words(lines, n_bytes, vocab_size)
            tokenizer = Tokenizer(train_bpe(words, vocab_size))
        ends = write_ids(lines, tokenizer, train)
        size = ends[-1] if ends else 0
        if size < 4:
            raise InputError(f"too little text: {size} tokens; left out: {list_of()}")
        cut = cut_of(ends, size, val_fraction)
        train.seek(2 * cut)  # train.bin has all of it, and now its end moves to val.bin
        with whole_file(out_dir / "val.bin") as val, whole_file(out_dir / "tokenizer.json") as file:
            shutil.copyfileobj(train, val)
            file.write(tokenizer.to_json().encode())
        train.truncate(2 * cut)
    median = np.median(np.diff([0, *ends]))
    show_progress(f"{out_dir}: {len(ends)} documents, {n_bytes / 1e6:.2f} MB, {cut} + {size - cut}"
                  f" tokens of {n_bytes / size:.2f} bytes, vocabulary {tokenizer.size}\nthe median"
                  f" document has {median:.0f} tokens; gpt.py sees --block_size {CONTEXT} at once",
                  last=True)
    report()

# ---------------------------------------------------------------- main
CONTEXT = 64  # of gpt.py, by default

def setting(default, help, low=0, high=1e9, **arg):
    """A dataclass field that is a command-line flag too, with a range and what argparse takes."""
    arg["help"] = help + (f" [{default}]" if default else "")
    return field(default=default, metadata={"range": (low, high), "arg": arg})

@dataclass(frozen=True)
class Config:
    inputs: str = setting((), "text; nothing: the built-in corpus", nargs="*", positional=True)
    out_dir: str = setting("data", "where train.bin, val.bin and tokenizer.json go")
    vocab_size: int = setting(None, "tokens; by default as the text needs", FIRST_MERGE, 1 << 16)
    tokenizer: str = setting("", "use that of this tokenizer.json or checkpoint, to go on with it")
    val_fraction: float = setting(0.1, "part of the text, from its end, held out", 1e-6, 0.9)
    seed: int = setting(0, "divides the built-in corpus into A, B and U", high=2**32 - 1)
    control: bool = setting(False, "leave the documents about B out of the built-in corpus")

def write_questions(path, rows):
    """The questions of the built-in text; without rows they are removed, for they go with it. But a
    file that somebody else has written is left alone."""
    if path.exists():
        lines = path.read_bytes().splitlines()
        if not all(line.startswith(b'{"built_in"') for line in lines):
            return say(f"{path}: not made by prepare.py, so it stays as it is")
        path.unlink()
    if rows:
        with whole_file(path) as file:
            for row in rows:
                line = json.dumps({"built_in": True} | row, ensure_ascii=False)
                file.write(f"{line}\n".encode())

def main(argv):
    s, given = read_flags(Config, argv, __doc__)
    if s.tokenizer and s.vocab_size:
        raise InputError("--tokenizer has its vocabulary; leave out --vocab_size")
    tokenizer = Tokenizer.load(s.tokenizer) if s.tokenizer else None
    out_dir = Path(s.out_dir)
    vocab_size = s.vocab_size
    questions = []
    test = []
    if s.inputs:
        pieces = read_documents(files_in(s.inputs))
    else:
        from corpus.world import built_in_corpus
        documents, questions, test = built_in_corpus(s.seed, not s.control)
        pieces = zip(documents, itertools.repeat(True))
        vocab_size = vocab_size or 3584
    write_tokens(pieces, tokenizer, vocab_size, s.val_fraction, out_dir)
    write_questions(out_dir / "qa.jsonl", questions)
    write_questions(out_dir / "qa_test.jsonl", test)
    base = s.tokenizer if s.tokenizer.endswith(".npz") else "out/base.npz"
    init = f" --init {base}" if s.tokenizer else ""
    folder = f" --data_dir {out_dir}" if "out_dir" in given else ""
    say(f"next: python gpt.py{init}{folder}")

# ---------------------------------------------------------------- helpers of all scripts
def available_cores():
    """How many we may use. On a Mac only the fast ones: they would wait for the slow ones, which
    get an equal share of the work."""
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

def say(*what, **how):
    """Print. If the terminal, or the reader of a pipe, is gone, go on without it."""
    try:
        print(*what, flush=True, **how)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "r+")  # it may have been closed
        setattr(sys, name, stream)
        with suppress(AttributeError, OSError):  # a notebook's has no such thing, or it is too late
            stream.reconfigure(errors="replace")
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
    say("error:", printable(problem).replace("\n", " "), file=sys.stderr)
    sys.exit(2)

def read_flags(settings_class, argv, doc):
    """Command line -> (settings, the set of names that were given)."""
    def error(message):
        raise InputError(f"{message}; see --help")

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    parser.error = error  # its own ends the program
    known = {f.name: f for f in fields(settings_class) if f.metadata}
    for name, f in known.items():
        arg = f.metadata["arg"] | ({"action": "store_true"} if f.type is bool else {"type": f.type})
        is_positional = arg.pop("positional", False)
        parser.add_argument(name if is_positional else f"--{name}", **arg)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        [near] = difflib.get_close_matches(name, known, 1) or ["help"]
        raise InputError(f"unknown argument {unknown[0]}, did you mean --{near}?")
    given = vars(found)
    for name, value in given.items():
        low, high = known[name].metadata["range"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise InputError(f"--{name} {value}: must be from {low} to {high:g}")
    return settings_class(**given), set(given)

def show_progress(text, last=False):
    """One line that stays in place on a terminal; when piped, only its last state is printed."""
    on_terminal = sys.stdout.isatty()
    if last:
        say(f"\r{text}\033[K" if on_terminal else text)
    elif on_terminal:  # a longer line would begin a new one each time
        width = shutil.get_terminal_size().columns - 1
        say(f"\r{text[:width]}\033[K", end="")

def clock(seconds):
    """Minutes and seconds:

    >>> clock(83)
    '1:23'
    """
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"

def count(what, where):
    """Note that something is left out; report() tells of it, or an error that ends the program."""
    left_out.setdefault(what, [0, where])[0] += 1

def count_fields(names, source):
    for name in sorted(names):
        count(f"field(s) not used: {name}", source)

def list_of():
    parts = [f"{n} {what} (the first: {at})" for what, (n, at) in left_out.items()]
    return "; ".join(parts) or "nothing"

def report():
    if left_out:
        say(f"left out: {printable(list_of())}")
    left_out.clear()

def printable(text):
    """Text without what steers a terminal: control characters, surrogates, marks of direction."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "�", text)

def keep_previous(path):
    """Give the file that is there the name *.prev.* too."""
    if path.exists():
        kept = path.with_suffix(f".prev{path.suffix}")
        with whole_file(kept) as file, open(path, "rb") as original:
            shutil.copyfileobj(original, file)
        say(f"the {path.name} that was there is now {kept}")

@contextmanager
def whole_file(path):
    """The old or the whole new file is there, whenever power fails. If it is a link to a file
    elsewhere, it stays one."""
    real = os.path.realpath(path)
    part = Path(f"{real}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, real)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk names no file
        raise
    finally:
        part.unlink(missing_ok=True)

@contextmanager
def only_writer(folder):
    """Keep a second program from writing there, by a lock that ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: locked, as by a program that trains there; wait, or take"
                             " another --out_dir; python chat.py"
                             f" {folder}/base.npz talks to it") from None
        except (ImportError, OSError):  # Windows has other locks, some network drives none
            say(f"{folder}: no locks here; take care that nothing else trains there")
        yield

@contextmanager
def wishes_to_stop():
    """-> a list that Ctrl-C and its kin put something in; training then saves and stops. When its
    terminal is closed it goes on."""
    wishes = []

    def wish(*_):
        wishes.append(True)

    actions = {"SIGINT": wish, "SIGTERM": wish, "SIGHUP": signal.SIG_IGN}
    with ExitStack() as stack:
        for name in actions.keys() & dir(signal):  # Windows has no SIGHUP
            number = getattr(signal, name)
            before = signal.signal(number, actions[name])
            stack.callback(signal.signal, number, before)
        yield wishes

def draw(losses):
    """A line of at most 72 small bars, each the mean of a part, between the first and the last:

    >>> draw([4, 3, 2, 3])
    loss 4.00 █▄▁▄ 3.00
    """
    means = [part.mean() for part in np.array_split(losses, min(72, len(losses)))]
    heights = np.interp(means, [min(means), max(means)], [0, 7])
    bars = "".join("▁▂▃▄▅▆▇█"[int(height)] for height in heights)
    say(f"loss {means[0]:.2f} {bars} {means[-1]:.2f}")

if __name__ == "__main__":
    run(main)

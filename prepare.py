"""Text in, token files out: a byte-level BPE tokenizer from scratch, the readers, and the built-in corpus.

    python prepare.py                      # the built-in corpus and its questions and answers
    python prepare.py my.txt more/         # your own text: files, folders, .jsonl, .gz, .bz2, or - for standard input

It writes train.bin and val.bin (uint16 token ids) and tokenizer.json. Reading order: errors and flags, Tokenizer,
reading text, the built-in corpus, main.
"""
import argparse
import bz2
import codecs
import contextlib
import csv
import dataclasses
import difflib
import functools
import gzip
import heapq
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import stat
import sys
import time
import zlib
from collections import Counter, defaultdict
from multiprocessing import Pool

import numpy as np

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# ---------------------------------------------------------------- errors and flags


class InputError(Exception):
    """Something the user can put right; run() prints it as one line."""


def run(main, argv=None):
    """Call main(argv) as a script: errors become one line on stderr and exit status 2."""
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
        problem = (f"{(str(e) or 'out of memory').splitlines()[0][:200]}; a smaller model or batch may fit, the"
                   " versions of requirements.txt may work better, JAX_PLATFORMS=cpu uses the CPU")
    print("error:", printable(problem).replace("\n", " "), file=sys.stderr, flush=True)
    if argv is not None:
        sys.exit(2)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(2)  # a script ends at once, it does not wait for other processes of its run


def setting(default, help, low=0, high=1e18, **arg):
    """A dataclass field that is also a command-line flag with a range; `arg` goes to argparse.add_argument."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, arg=arg))


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


def time_left(started, done, total):
    """How long the rest takes if it goes on as since `started`."""
    seconds = round((time.time() - started) * (total - done) / max(done, 1))
    return f"{seconds // 60}:{seconds % 60:02} left"


def printable(text):
    """Text without control characters: what a model or a file says must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@contextlib.contextmanager
def whole_file(path):
    """Open a file for writing so that a reader finds the old one or the whole new one, whenever the power fails."""
    part = pathlib.Path(f"{path}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- tokenizer

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
END, USER, ASSISTANT = range(3)
FIRST_BYTE, FIRST_MERGE = 3, 259  # ids: the special tokens, the 256 bytes, the merges in the order they were learned

# GPT-4's way of splitting text into words, with the standard re module. Merges never cross a word. No word is longer
# than 256 characters: a megabyte of one letter would otherwise take quadratic time.
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?[^\W\d_]{1,255}|\d{1,3}| ?(?:[^\s\w]|_){1,255}[\r\n]{0,8}"
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
    """Counts of words -> list of merges (pairs of ids), the most frequent pair first (Sennrich 2016, arXiv 1508.07909).

    A heap gives the most frequent pair, of equals the smallest; only the words that hold it are recounted. A count in
    the heap may be out of date (too high): it goes back as it is now."""
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


# ---------------------------------------------------------------- reading text, writing tokens

PIECE = 1 << 20  # characters; text is read and encoded in pieces of about this size
TEXT_FILES = tuple(kind + packed for kind in (".txt", ".md", ".jsonl") for packed in ("", ".gz", ".bz2"))


def read_lines(path):
    """A file (decompressed when its name ends in .gz or .bz2, "-" for standard input) -> (line, "file:line"). Refuses
    what is clearly not UTF-8 text; single bytes that are not become U+FFFD."""
    source = "standard input" if path == "-" else path
    number = 0
    unpack = {".gz": gzip.open, ".bz2": bz2.open}.get(pathlib.Path(path).suffix, open)
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else unpack(path, "rb") as file:
        try:
            while raw := file.readline(16 * PIECE):
                number += 1
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InputError(f"{source}:{number}: UTF-16 text; save it as UTF-8 first")
                if b"\0" in raw:
                    raise InputError(f"{source}:{number}: not text (it has zero bytes)")
                yield raw.decode("utf-8", "replace").removeprefix("\ufeff"), f"{source}:{number}"
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{source}:{number + 1}: damaged ({e})") from None


def json_text(line, source):
    """One JSON line -> its "text"."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(text := json.loads(line)["text"], str):
            return text
    raise InputError(f'{source}: not a JSON object with a "text" string')


def files_in(paths):
    """Paths -> the same with each folder replaced by the text files in it, in order of their names."""
    files = []
    for path in paths:
        if path == "-" or not stat.S_ISDIR(os.stat(path).st_mode):  # what is missing is an error now, not later
            files.append(path)
        else:
            inside = pathlib.Path(path).rglob("*")
            inside = sorted(str(p) for p in inside if p.name.endswith(TEXT_FILES) and p.is_file())
            if not inside:
                raise InputError(f"{path}: a folder without text files ({', '.join(TEXT_FILES)})")
            files += inside
    return files


def read_documents(files, max_bytes):
    """Files -> (line, whether a document ends there); a JSON line is a document of its own."""
    size, invalid, empty = 0, 0, []
    for path in files:
        if 0 < max_bytes <= size:
            break
        before, json_lines = size, ".jsonl" in pathlib.Path(path).suffixes[-2:]
        for line, source in read_lines(path):
            if 0 < max_bytes <= size:
                break
            size += len(line.encode())
            invalid += line.count("\ufffd")
            json_lines = json_lines or (source == "standard input:1" and line.startswith('{"'))
            if not json_lines:
                yield line, False
            elif line.strip():
                yield json_text(line, source), True
        if size == before:
            empty.append(path)
        elif not json_lines:
            yield "", True
    if not size:
        raise InputError(f"{path}: empty; give it some text")
    if empty:
        show_progress(f"left out: {len(empty)} empty file(s), such as {empty[0]}", last=True)
    if invalid:
        show_progress(f"warning: {invalid} invalid UTF-8 sequences became U+FFFD", last=True)


def in_groups(lines):
    """(line, whether its document ends there) -> lists of (text, the same) of about a million characters, each a job
    for a worker. A document is cut only before a line that begins with a letter: no token would cross that border."""
    group, held, length = [], [], 0
    for line, ends in lines:
        if length >= PIECE and (not held or line[:1].isalpha() or length >= 16 * PIECE):
            yield group + [("".join(held), False)]
            group, held, length = [], [], 0
        held.append(line)
        length += len(line)
        if ends:
            group.append(("".join(held), True))
            held = []
    if group:
        yield group


def encode_group(group, tokenizer):
    """Texts -> uint16 ids, each document closed by <|end|>."""
    return np.array([i for text, ends in group for i in tokenizer.encode(text) + [END] * ends], "<u2")


def write_tokens(lines, vocab_size, val_fraction, out_dir, expected=0):
    """Lines of documents -> tokenizer.json, train.bin, val.bin. The tokenizer learns from the first 32 million
    characters; the rest streams through all cores. Nothing in out_dir changes before all of it is written. The
    `expected` bytes, where known, give the time left."""
    started, groups, words = time.time(), in_groups(lines), Counter()
    first = list(itertools.islice(groups, 32))
    for text, _ in itertools.chain(*first):
        words.update(WORD.findall(text))
    if not vocab_size:  # in proportion to the text: a token that is hardly ever seen is hardly learned
        length = sum(len(w) * n for w, n in words.items())
        vocab_size = max(384, min(1 << 15, round(length**0.5 / 2)))
    tokenizer = Tokenizer(train_bpe(words, vocab_size))
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
            left = time_left(started, n_bytes, expected) if expected else ""
            show_progress(f"{n_bytes / 1e6:.0f} MB, {size / 1e6:.1f} M tokens  {left}")
        ends, cut = np.concatenate(ends), int(size * (1 - val_fraction))
        if len(ends) > 1:  # whole documents, at least one on each side
            cut = int(ends[np.searchsorted(ends[:-2], cut)])
        if not 2 <= cut <= size - 2:
            raise InputError(f"too little text: {size} tokens; give it more")
        train.seek(2 * cut)
        with whole_file(out_dir / "val.bin") as val, whole_file(out_dir / "tokenizer.json") as readable:
            shutil.copyfileobj(train, val)
            readable.write(tokenizer.to_json().encode())
        train.truncate(2 * cut)
    show_progress(f"{out_dir}: {len(ends)} documents, {n_bytes / 1e6:.2f} MB, {cut} + {size - cut} tokens"
                  f" ({n_bytes / size:.2f} bytes each), vocabulary {tokenizer.size}, {time.time() - started:.1f} s",
                  last=True)


# ---------------------------------------------------------------- the built-in corpus

# data/world.csv holds the facts, data/wordings.csv the ways to state them and to ask for them: {x} is the subject, {xs}
# its possessive, {v} the value, {n} a noun phrase. An attribute's first statement is also the answer. Wordings whose
# use begins with "new" are kept out of training: they test questions that were never seen.
ATTRIBUTES = ["capital", "continent", "language", "currency", "symbol", "number", "country"]


def fill(template, x, v=""):
    """fill("{xs} capital is {v}.", "the Netherlands", "Amsterdam") -> "The Netherlands' capital is Amsterdam." """
    text = template.format(x=x, v=v, xs=x + ("'" if x.endswith("s") else "'s"))
    return text[0].upper() + text[1:]


def read_csv(name):
    return csv.DictReader(pathlib.Path(__file__).with_name("data").joinpath(name).read_text("utf-8").splitlines())


def read_wordings():
    """wordings.csv -> {(about, use): [wording, ...]}; uses "seen" and "new" get all questions after an attribute."""
    say = defaultdict(list)
    for row in read_csv("wordings.csv"):
        if row["use"] == "small talk":  # about what is said: the reply to it
            say["any", "small talk"].append([row["wording"], row["about"]])
        say[row["about"], row["use"]].append(row["wording"])
    for a in ATTRIBUTES:
        framed = lambda frame, noun: [f.replace("{n}", n) for f in say["any", frame] for n in say[a, noun]]
        say[a, "seen"] = framed("frame", "noun") + say[a, "question"]
        say[a, "new"] = framed("frame", "new noun") + framed("new frame", "noun") + say[a, "new question"]
    return say


def built_in_corpus(seed):
    """-> (documents, question/answer records to train on, records to test with).

    The rows of world.csv are divided once: A has its facts in documents and in questions, B only in documents, C in
    neither, it is just named. What the model answers about B it can only have learned in pretraining.
    """
    rng, say = random.Random(seed), read_wordings()
    pick = lambda use, about="any": rng.choice(say[about, use])
    answer = lambda x, a, v: fill(say[a, "statement"][0], x, v)
    question_and_answer = lambda x, a, v: [vary(fill(pick("seen", a), x)), answer(x, a, v)]

    def vary(question):
        """The same question as people type it: words before or after it, no final mark, small letters."""
        if rng.random() < 0.2:
            question = f"{pick('prefix')} {question[0].lower()}{question[1:]}"
        if rng.random() < 0.25:
            question = question.rstrip(".?")
        if rng.random() < 0.08:
            question += rng.choice([" Thanks!", ", please", " please", " thanks"])
        return question.lower() if rng.random() < 0.3 else question

    def small_talk():
        said, reply = pick("small talk")
        return [vary(said), reply]

    def record(turns):
        if len(turns) == 2:
            return dict(zip(["instruction", "response"], turns))
        return dict(messages=[dict(role=r, content=c) for r, c in zip(["user", "assistant"] * 2, turns)])

    documents, facts = [], {"A": [], "B": [], "C": []}
    world = list(read_csv("world.csv"))
    rng.shuffle(world)
    for i, row in enumerate(world):
        group = "C" if i < len(world) * 0.1 else "B" if i < len(world) * 0.25 else "A"
        subjects = {row["name"]: {a: v for a, v in row.items() if v and a in ATTRIBUTES}}
        if row["capital"]:
            subjects.setdefault(row["capital"], {})["country"] = row["name"]
        for x, about in subjects.items():
            facts[group] += [(x, a, v, about) for a, v in about.items()]
            times = 10 if group == "C" else {1: 12, 2: 20}.get(len(about), 30)
            for _ in range(times):
                if group == "C":
                    sentences = [fill(pick("neutral"), x) for _ in range(3)]
                else:
                    sentences = [fill(pick("neutral"), x)] if rng.random() < 0.15 else []
                    for a, v in rng.sample(list(about.items()) * 4, 4):
                        sentences.append(fill(pick("statement", a), x, v))
                documents.append(" ".join(s.lower() if rng.random() < 0.15 else s for s in sentences))

    train = []
    for x, a, v, about in facts["A"] * 16:
        turns = question_and_answer(x, a, v)
        others = [b for b in about if b != a and say[b, "follow-up"]]
        if others and rng.random() < 0.1:
            b = rng.choice(others)
            follow_up = pick("follow-up frame").replace("{n}", pick("follow-up", b))
            turns += [vary(follow_up), answer(x, b, about[b])]
        elif rng.random() < 0.15:  # or something else after another answer
            x, a, v, _ = rng.choice(facts["A"])
            second = small_talk() if rng.random() < 0.4 else question_and_answer(x, a, v)
            first = turns if rng.random() < 0.8 else small_talk()
            turns = first + second
        train.append(record(turns))
    train += [record(small_talk()) for _ in range(len(train) // 20)]

    test = []
    for group, use in [("A", "seen"), ("A", "new"), ("B", "seen"), ("B", "new"), ("C", "seen")]:
        asked = rng.sample(facts["A"], 300) if group == "A" else facts[group] * 2
        for x, a, v, _ in asked:
            test.append(dict(instruction=fill(pick(use, a), x), response=answer(x, a, v), attribute=a, value=v,
                             set=f"{group}, {use} wording"))
    for x, a, v, _ in facts["B"]:
        prompt, rest = answer(x, a, "|").split("|")
        test.append(dict(prompt=prompt.rstrip(), response=f" {v}{rest}", attribute=a, value=v,
                         set="B, sentence to complete"))
    rng.shuffle(documents)
    rng.shuffle(train)
    return documents, train, test


# ---------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Settings:
    inputs: str = setting((), "text files, folders, .jsonl with a \"text\" field, also .gz or .bz2; - is standard"
                          " input; nothing: the built-in corpus", nargs="*", positional="inputs", metavar="INPUT")
    out_dir: str = setting("data", "where train.bin, val.bin and tokenizer.json go")
    vocab_size: int = setting(0, "tokens in the vocabulary; 0 fits it to the text", high=1 << 16)
    val_fraction: float = setting(0.1, "part of the text, from its end, held out for validation", low=1e-6, high=0.9)
    max_bytes: int = setting(0, "take only about so much from the beginning of the text; 0 takes all of it")
    seed: int = setting(0, "divides the built-in corpus into A, B and C", high=2**32 - 1)


def main(argv):
    s, _ = read_flags(Settings, argv, __doc__)
    if 0 < s.vocab_size < FIRST_MERGE:
        raise InputError(f"--vocab_size {s.vocab_size}: must be at least {FIRST_MERGE}, the bytes and special tokens")
    out_dir = pathlib.Path(s.out_dir)
    if s.inputs:
        files = files_in(s.inputs)
        plain = [f for f in files if f != "-" and not f.endswith((".gz", ".bz2"))]
        expected = s.max_bytes or (sum(map(os.path.getsize, plain)) if plain == files else 0)
        write_tokens(read_documents(files, s.max_bytes), s.vocab_size, s.val_fraction, out_dir, expected)
        for name in ("qa", "qa_test"):  # questions about the built-in corpus do not fit this text
            with contextlib.suppress(FileNotFoundError):
                os.replace(out_dir / f"{name}.jsonl", out_dir / f"{name}.prev.jsonl")
    else:
        documents, train, test = built_in_corpus(s.seed)
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, records in [("qa.jsonl", train), ("qa_test.jsonl", test)]:
            with whole_file(out_dir / name) as file:
                file.writelines(f"{json.dumps(r, ensure_ascii=False)}\n".encode() for r in records)
        write_tokens(((d, True) for d in documents), s.vocab_size or 2048, s.val_fraction, out_dir)
        print(f"{out_dir}: {len(train)} questions and answers to learn from, {len(test)} to test with")
    print("next: python gpt.py")


if __name__ == "__main__":
    run(main)

"""How things are said: the wordings in corpus/wordings.csv and corpus/topics.csv, put together by
chance. A row has what it is about (a capital, a topic, any thing), its use and the wording:

    about    use                wording
    capital  statement          The capital of {x} is {v}.    the first is the answer, too
    any      statement          I read a book about {x}.      tells nothing about it
    any      not known          {noun} is not known.
    capital  question           Where is the government of {x}?
    any      question           Say {noun}.
    any      noun               the {name} of {x}
    capital  name               capital
    capital  follow-up          What city is its capital?
    any      follow-up subject  And {x}?
    any      prefix, suffix     Quick question:               words around a question
    hello    reply              Good day.                     the answer to small talk
    place    ending             land                          of made-up names

Uses that begin with "new" ("new question", "new noun", "new prefix") and "two words" are kept for
the test."""
import csv, pathlib, random, re, unicodedata
from collections import defaultdict

rng = random.Random()  # the source of all chance; built_in_corpus seeds it

def chance(p):
    return rng.random() < p

def read_csv(name):
    text = pathlib.Path(__file__).with_name(name).read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))

WORDINGS = defaultdict(list)  # (about, use) -> wordings; a "new" use is kept for the test
for row in read_csv("wordings.csv") + read_csv("topics.csv"):
    WORDINGS[row["about"], row["use"]].append(row["wording"])

def wording(use, a="any"):
    """A wording for this use: half the time from the rows about a, half the time from those about
    any thing. A {part} is worded in turn:

        Say {noun}.  ->  Say the {name} of {x}.  ->  Say the capital of {x}.

    A topic without a row "name", such as jokes, cannot take rows about any thing, for these need
    its name. If it has no rows for this use (say "new question"), its rows "question" serve."""
    if WORDINGS[a, "name"]:
        sources = [WORDINGS[a, use], WORDINGS["any", use]]
    else:
        sources = [WORDINGS[a, use] or WORDINGS[a, "question"]]
    text = rng.choice(rng.choice([*filter(None, sources)]))
    return re.sub("{(name|noun|new noun)}", lambda part: wording(part[1], a), text)

def capitalized(text):
    return text[0].upper() + text[1:]

def fill(template, x, v=""):
    """A wording with the subject x and the value v in it:

    >>> fill("{x}'s capital is {v}.", "Laos", "Vientiane")
    "Laos' capital is Vientiane."
    """
    return capitalized(template.format(x=x, v=v).replace("s's", "s'"))

def careless(text):
    """The text as people type it: at times without accents, apostrophes or capital letters."""
    if chance(0.15):
        text = unicodedata.normalize("NFD", text).encode("ascii", "ignore").decode()
    if chance(0.1):
        text = text.replace("'", "")
    return text.lower() if chance(0.3) else text

def slips_in(text):
    """A text with one slip of the finger in one of its longer words, in all ways there are: two
    letters swapped or, but for the last letter of a word, one left out or doubled.

    >>> list(slips_in("a tree"))
    ['a rtee', 'a ree', 'a ttree', 'a tere', 'a tee', 'a trree', 'a tre', 'a treee']
    """
    for word in re.finditer(r"[^\W\d_]{4,}", text):
        for i in range(word.start(), word.end() - 1):
            a, b = text[i:i + 2]
            for typed in (b + a, b, a + a + b):
                if typed != a + b:
                    yield text[:i] + typed + text[i + 2:]

def slip(text):
    slips = [*slips_in(text)]
    return rng.choice(slips) if slips else text

def sentence(x, a, v):
    """A sentence as people write it. It says that v is the a of x or, without v, that this is not
    known. If a is "any" it only names x."""
    if v or a == "any":
        template = rng.choice(WORDINGS[a, "statement"])
    else:
        template = wording("not known", a)
    return careless(fill(template, x, v))

def ask(x, a, use="question"):
    """A question as people type it: the name at times without "the" or with a capital letter
    ("Gold"); at times with words before or after it, or without its mark."""
    question = wording(use, a)
    if chance(0.2):
        x = x.removeprefix("the ")
    if chance(0.1):
        x = capitalized(x)
    question = fill(question, x)
    if chance(0.35):
        question = f"{wording('prefix')} {question[0].lower()}{question[1:]}"
    if chance(0.25):
        question = question.rstrip(".?") or question  # "???" is one too
    if chance(0.3):
        question = f"{question} {wording('suffix')}"
    return careless(question)

def ask_in_haste(x, a, how):
    """A question as people type it in a hurry, in ways that no training question has: with other
    words around it, with a slip of the finger (sft.as_read puts right what it can), and so on."""
    if how == "in two words":
        return careless(fill(wording("two words", a), x))
    question = wording("question", a)
    if how == "slip in a word":
        return fill(slip(question), x)
    if how == "slip in the name":
        return fill(question, slip(x))
    if how == "with chatter":
        return f"{wording('new prefix')} {fill(question, x)} {wording('new suffix')}"
    return fill(question, x).upper()

"""The built-in corpus: documents that tell facts, and questions, some of which nobody told the
answer to. prepare.py runs it when it is given no text. corpus/wording.py puts all into words.

A subject x is a country, a capital or an element, or a name of which nothing is told. An attribute
a is what is told or asked of it: its currency, its symbol, or a topic like its king."""
import math, re
from collections import defaultdict

from corpus.wording import WORDINGS, ask, ask_in_haste, chance, fill, read_csv, rng, sentence

KINDS = {
    "place": ["capital", "continent", "language", "currency", "country"],
    "element": ["symbol", "number"],
}
ATTRIBUTES = KINDS["place"] + KINDS["element"]
DONT_KNOW = "I do not know that."
# What may be asked is kept in pools: {name: [(x, a), ...]}. These are the names, and how often
# training draws from each pool: 27 of 52 times from A. U is what nobody told. The names of its
# pools are true in the test: "nowhere" means that no document has the name. Of each name from
# unknowns.csv that training asks about, a document says what is not known (see tell_unknown).
SHARES = {
    "A": 27,  # told: the capital of Peru
    "small talk": 2,  # Hello
    "U, mentioned": 1,  # the capital of Bavaria, which documents name and tell nothing about
    "U, nowhere, real": 3.5,  # the capital of Texas
    "U, nowhere, made up": 1.5,  # the capital of Tovania; documents tell of other made-up names
    "U, cannot have": 3.5,  # the capital of gold, which documents say is not known
    "U, other matters": 13.5,  # the king of Peru; Who wrote Hamlet?
}

def subjects_of(row):
    """A row of world.csv -> {subject: {attribute: value}}: a country and its capital, or an
    element. A cell may hold several names, the one for answers first:

    >>> subjects_of({"name": "Ukraine", "capital": "Kyiv; Kiev"})
    {'Ukraine': {'capital': 'Kyiv'}, 'Kyiv': {'country': 'Ukraine'}, 'Kiev': {'country': 'Ukraine'}}
    """
    names = row["name"].split("; ")
    facts = {a: row[a].split("; ")[0] for a in ATTRIBUTES if row.get(a)}
    subjects = dict.fromkeys(names, facts)
    for capital in filter(None, row["capital"].split("; ")):
        subjects[capital] = subjects.get(capital, {}) | {"country": names[0]}
    return subjects

WORLD = [subjects_of(row) for row in read_csv("world.csv")]
FACTS = {}  # subject -> {attribute: value}
for subjects in WORLD:
    FACTS |= subjects
UNKNOWN = {row["name"]: KINDS[row["kind"]] for row in read_csv("unknowns.csv")
           if row["name"] not in FACTS}  # name -> what is asked of it
TAKEN = {x.lower().removeprefix("the ") for x in [*FACTS, *UNKNOWN]}
TOPICS = sorted({row["about"] for row in read_csv("topics.csv")})

ONSETS = "b c d f g h j k l m n p r s t v w z br ch dr gr pl qu st th tr".split() + [""]

def made_up(kind):
    """A name that is nobody's, of syllables: "Tovania", "melodium". Names closer to known ones than
    these would teach it to doubt B, too."""
    while True:
        syllables = [ONSETS, "aeiou", ["", "", "", "l", "n", "r"]] * rng.randint(2, 3)
        name = "".join(map(rng.choice, [*syllables, WORDINGS[kind, "ending"]]))
        if name not in TAKEN:
            return name if kind == "element" else name.capitalize()

def value(x, a):
    return FACTS.get(x, {}).get(a, "")

def tell(x, attributes, n):
    """n documents about x, each of four sentences: facts, or that they are not known. Now and then,
    and if there are no attributes always, a sentence only names x."""
    for _ in range(n):
        told = rng.choices([*attributes] * 6 + ["any"], k=4)
        yield " ".join(sentence(x, a, value(x, a)) for a in told)

def answer(x, a):
    v = value(x, a)
    if v:
        return fill(WORDINGS[a, "statement"][0], x, v)
    return (WORDINGS[a, "reply"] or [DONT_KNOW])[0]

def told_by(statement):
    """-> (x, a), if a statement is worded as in the corpus and tells the a of x; else None.

    >>> told_by("The capital of Qo is Zed."), told_by("On the map, Peru is in South America.")
    (('Qo', 'capital'), ('Peru', 'continent'))
    """
    told = {}
    for a in ATTRIBUTES:
        values = {facts.get(a) for facts in FACTS.values()}
        for template in WORDINGS[a, "statement"]:
            # A pattern such as "The capital of (?P<x>.+) is (?P<v>.+)."
            found = re.fullmatch(fill(template, "(?P<x>.+)", "(?P<v>.+)"), statement)
            # A template without the attribute's name fits other sentences, too: "{x} is in {v}.",
            # of continents, fits "Paris is in France." There v must be a value of the attribute.
            if found and (a in template or found["v"] in values):
                told[found["x"]] = a
    x = min(told, key=len, default=None)  # of "On the map, Peru" and "Peru"
    return (x, told[x]) if told else None

def reworded(question, statement):
    """The question or, half the time, another one that the statement answers: "The capital of Togo
    is Lomé." also answers "Which city runs Togo?"."""
    told = told_by(statement)
    if not told or chance(0.5):
        return question
    return ask(*told)

def is_ambiguous(x, a):
    """Whether a is the continent and x a capital, but no country. "Where is Lima?" may ask for its
    continent, which nobody told, or for its country, which is told: so it is never asked."""
    return a == "continent" and not value(x, a) and value(x, "country") != ""

LONGEST = 190  # characters of a conversation; the 64 tokens that the model sees hold about so many

def next_question(x, a, pools):
    """What is asked after a question about (x, a) -> (subject, attribute, use). Mostly that is
    (y, b), drawn from the pools. At times it is a follow-up: the a of y, or the b or something else
    of x."""
    [name] = rng.choices(list(SHARES), SHARES.values())
    y, b = rng.choice(pools[name])
    follows = WORDINGS[a, "name"] and WORDINGS[b, "name"] and chance(0.3)
    if follows and chance(0.5) and not is_ambiguous(y, a):
        return y, a, "follow-up subject"  # And Chile?
    if follows and not is_ambiguous(x, b):
        attributes = [b, *FACTS.get(x, [])]  # b alone would mostly be unknown
        return x, rng.choice(attributes), "follow-up"  # And its currency?
    return y, b, "question"  # What is the symbol of gold?

def conversation(pools):
    """Questions and their answers, as many as fit."""
    x = a = ""  # what was asked last: nothing
    messages, length = [], 0
    while True:
        x, a, use = next_question(x, a, pools)
        question = ask(x, a, use)
        said = answer(x, a)
        length += len(question) + len(said)
        if messages and length > LONGEST:
            return {"messages": messages}
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]

def tell_known(subjects, group, pools):
    """Documents about a country and its capital, or an element. What may be asked of them is put
    into the pools; so in tell_unknown."""
    for x, facts in subjects.items():
        yield from tell(x, facts, 18 + 3 * len(facts))
        yield from tell(x, ATTRIBUTES, 3)  # what it cannot have is told as not known
        for a in ATTRIBUTES:
            if a in facts:
                # Capitals and elements have one fact or two. These count double, so that their
                # attributes are asked about as often as others.
                pools[group] += [(x, a)] * (2 if len(facts) < 3 else 1)
            elif not is_ambiguous(x, a):
                pools["U, cannot have"].append((x, a))

def tell_unknown(train, test):
    """Documents about the names of unknowns.csv. A third of them is asked in the test. So are all
    with a word of a name of B: training to decline El Dorado would teach to decline El Salvador."""
    never_asked = {word for x, _ in test["B"] for word in x.split()}
    for x, attributes in UNKNOWN.items():
        name = "U, mentioned" if chance(0.2) else "U, nowhere, real"
        if name == "U, mentioned":
            yield from tell(x, [], 3)
        pools = rng.choice([train, train, test])
        if never_asked & {*x.split()}:
            pools = test
        pools[name] += [(x, a) for a in attributes]
        if pools is train:
            yield from tell(x, attributes, 1)

def divide(tell_b):
    """-> (documents, what to train on, what to test with: {set: [(subject, attribute), ...]}).
    A is told and asked, B told (but in the control) and never asked; U is unknown."""
    train, test = defaultdict(list), defaultdict(list)
    shuffled = rng.sample(WORLD, len(WORLD))
    n_b = math.ceil(0.15 * len(WORLD))
    documents = []
    for subjects in shuffled[:n_b]:
        documents += tell_known(subjects, "B", test)
    if not tell_b:
        documents.clear()
    for subjects in shuffled[n_b:]:
        documents += tell_known(subjects, "A", train)
    documents += tell_unknown(train, test)
    for topic in TOPICS:
        replies = WORDINGS[topic, "reply"]  # to small talk; nobody told of other topics
        pools = train if replies or not chance(0.1) else test
        name = "small talk" if replies else "U, other matters"
        pools[name] += [(x, topic) for x, _ in rng.choices(train["A"], k=300)]
    for kind, attributes in KINDS.items():
        for _ in range(150 * len(attributes)):  # about other names than those that are asked
            documents += tell(made_up(kind), attributes, 1)
        for a in attributes * 1000:
            pools = test if chance(0.05) else train
            pools["U, nowhere, made up"].append((made_up(kind), a))
    return documents, train, test

def examined(name, pool, n, asked, how):
    """n questions about what is in the pool. asked: ask or ask_in_haste, how: its last argument."""
    for x, a in rng.choices(pool, k=n):
        yield {"set": name, "attribute": a, "value": value(x, a), "instruction": asked(x, a, how),
               "response": answer(x, a)}

def examination(pools):
    """Questions to test with: of A and B 300 in seen and 300 in new wordings, of each kind of U
    200; and of what is told 200 in each way that people type in haste."""
    for name, pool in pools.items():
        for use, kind in ("question", "seen wording"), ("new question", "new wording"):
            if name in ("A", "B"):
                yield from examined(f"{name}, {kind}", pool, 300, ask, use)
            else:
                yield from examined(name, pool, 100, ask, use)
    for how in "slip in a word", "slip in the name", "with chatter", "in two words", "in capitals":
        yield from examined(f"in haste, {how}", pools["A"] + pools["B"], 200, ask_in_haste, how)

def built_in_corpus(seed, tell_b=True):
    """-> (documents, conversations to train on, questions to test with)."""
    rng.seed(seed)
    documents, train, test = divide(tell_b)
    rng.shuffle(documents)
    rng.seed(seed)  # the control has the same questions
    exam = list(examination({"A": train["A"]} | test))
    conversations = [conversation(train) for _ in range(41000)]
    return documents, conversations, exam

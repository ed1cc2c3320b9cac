"""Supervised fine-tuning: from a model that continues text to one that answers. Then DPO.

    python sft.py                        # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --eval held_out.jsonl
    python sft.py --show 3               # three examples, what is trained in brackets, then stop
    python sft.py --eval questions.jsonl # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                  # what was corrected in the chat, out/chat.npz -> dpo.npz
    python sft.py mine.jsonl --dpo       # the same, and these answers are to stay as they are

Pretraining gave it knowledge, here it learns the manner: by the loop of gpt.py, where of questions
and answers only the tokens of answers have weight."""
import difflib, json, re, zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import gpt
import jax
import jax.numpy as jnp
import numpy as np
from corpus import world
from prepare import ASSISTANT, END, SPECIAL, UNSPACED, USER, InputError, count, count_fields
from prepare import list_of, plain, printable, read_flags, read_json, read_lines, report, run, say
from prepare import setting, show_progress

# ---------------------------------------------------------------- what is learned from
class Message(NamedTuple):
    """What one side says. A dialogue is a list of them: user, assistant, user, assistant."""
    role: str
    text: str
    trained: bool = False  # whether it is to be learned

@dataclass(frozen=True)
class Example:
    """What is learned from, or what a test asks: a dialogue, or two that are a preference."""
    dialogues: list  # [the one to imitate] or [chosen, rejected]
    source: str  # "file:line"
    set: str = "all"  # of a test, whose table has a line for each set

    @property
    def chosen(self):
        return self.dialogues[0]

# ---------------------------------------------------------------- rows: what a step is trained on
A_WORD = rf"(?:(?![{UNSPACED}])[^\W\d_])+"  # a word, in scripts that have spaces between words

def in_small_letters(question):
    """A question, in small letters if it is all in capitals: hardly any text is written so. What is
    shorter than 8 may be a name, like "NASA?"."""
    return question.lower() if question.isupper() and len(question) > 7 else question

def as_read(question, words):
    """What somebody types, as the model is given it: not all in capitals; and a word that training
    never had becomes a frequent word that is one slip of the finger away, if there is one:

    >>> words = {"language": 99, "peru": 50}
    >>> as_read("WHICH LANUGAGE HAS PEERU?", words), as_read("NASA?", words)
    ('which language has peru?', 'NASA?')

    words: {word: how often training had it}; if it is empty all words stay."""
    def meant(found):
        typed = found[0]
        if len(typed) < 4 or typed.lower() in words:
            return typed
        frequent = [word for word, n in words.items() if n >= 20]
        # difflib's ratio of two words of n letters that differ by one slip is 1 - 1/n; 1.01 allows
        # for rounding errors. With 4 or 5 letters other words are so near ("York", "work": 0.75),
        # so there 0.83 is asked: a letter too many or too few reaches that ("peeru": 0.89).
        alike = 0.83 if len(typed) < 6 else 1 - 1.01 / len(typed)
        near = difflib.get_close_matches(typed.lower(), frequent, cutoff=alike)  # at most three
        word = max(near, key=words.get, default=typed)
        return word.capitalize() if typed.istitle() else word

    question = in_small_letters(question)
    return re.sub(A_WORD, meant, question) if words else question

def render(messages, tokenizer):
    """Messages -> (ids, which of them are trained):
        [("user", "hi", False), ("assistant", "ho", True)]
        ->  <|user|>  hi  <|assistant|>  ho   <|end|>
            False     ..  False          True True

    It is put together from ids, so no text can forge a special token. Texts are encoded with a
    space before them: then their first word is the same token as within a text. Messages that end
    with a question give the prompt of chat.py."""
    ids, trained = [], []
    for role, text, is_trained in messages:
        if role == "user":
            ids += [USER, *tokenizer.encode(f" {text}"), ASSISTANT]
        else:
            ids += [*tokenizer.encode(f" {text}"), END]
        trained += [is_trained] * (len(ids) - len(trained))
    return ids, trained

def shift(ids, trained, T):
    """-> x, y, w (T,), padded with zeros; w is 1 where the *target* y is trained:

    >>> shift([5, 6, 7], [False, False, True], 4).tolist()
    [[5, 6, 0, 0], [6, 7, 0, 0], [0, 1, 0, 0]]
    """
    row = np.zeros((3, T), np.uint16)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row

def that_fit(examples, tokenizer, T):
    """The examples that the context has room for; one line tells of the others."""
    fitting, lengths = [], []
    for example in examples:
        length = max(len(render(dialogue, tokenizer)[0]) for dialogue in example.dialogues)
        lengths.append(length)
        if length > T:
            count(f"of {len(examples)} examples, longer than the context of {T} tokens",
                  example.source)
        else:
            fitting.append(example)
    report()
    if len(fitting) < 0.75 * len(examples):
        say("the context is that of the base: one that nine in ten fit is trained by python"
            f" gpt.py --block_size {sorted(lengths)[len(lengths) * 9 // 10]}")
    if examples and not fitting:
        raise InputError(f"no example fits the context of {T} tokens")
    return fitting

def joined(examples, tokenizer, T, rng):
    """Examples in random order, joined until the context is full -> fewer, longer examples. That is
    like a chat, where a question has mostly nothing to do with the one before. Of up to 2,000
    all are used several times, each time in other company."""
    longer = [Example([[]], "")]
    for _ in range(1 + 2000 // len(examples)):
        for example in rng.permutation(examples):
            dialogue = longer[-1].chosen + example.chosen
            if len(render(dialogue, tokenizer)[0]) <= T:
                longer[-1] = Example([dialogue], "")
            else:
                longer.append(example)
    return longer

def rows_of(examples, tokenizer, T):
    """Examples of n dialogues each -> rows (N, n, 3, T): x, y, w."""
    return np.array([[shift(*render(dialogue, tokenizer), T) for dialogue in example.dialogues]
                     for example in examples])

def show(rows, tokenizer):
    """Print rows (N, 3, T) as text; what is trained is in brackets. From now on the tokenizer
    decodes special tokens, too. A character may be several tokens, so they are decoded together."""
    tokenizer.bytes[:len(SPECIAL)] = map(str.encode, SPECIAL)
    for x, y, w in rows:
        n = len(np.trim_zeros(x))  # without the padding
        text = SPECIAL[USER]  # the first x; the others are targets too
        for trained, places in groupby(range(n), lambda i: w[i]):
            part = tokenizer.decode(y[i] for i in places)
            text += f"[{part}]" if trained else part
        say(printable(text))

# ---------------------------------------------------------------- answers and their marks
CORRECTED = "corrected by you"  # the set of corrections in a test

def answer_all(params, cfg, tokenizer, words, examples):
    """What a model answers to the last question of each, 64 at a time -> [text]."""
    generate = gpt.make_generator(cfg)
    answers = []
    for start in range(0, len(examples), 64):
        some = examples[start:start + 64]
        prompts = []
        for example in some:
            *before, question, _ = example.chosen
            question = question._replace(text=as_read(question.text, words))
            prompts.append(render([*before, question], tokenizer)[0])
        steps = generate(params, prompts, cfg.block_size, None)  # no chance: the likeliest tokens
        answers += [tokenizer.decode(ids).strip() for ids in zip(*(new for new, _ in steps))]
        done = len(answers)
        show_progress(f"answering: {done} of {len(examples)}", done == len(examples))
    return answers

def examine(models, cfg, about, tokenizer, test):
    """Let models answer a test and print for each set of it how many % are right, word for word,
    declined or wrong; then what is answered now where there was a correction. models: [parameters],
    or those before and after DPO."""
    words = about.get("words", {})
    sets = np.array([example.set for example in test])
    wanted = np.array([example.chosen[-1].text.strip() for example in test])
    said = np.array([answer_all(params, cfg, tokenizer, words, test) for params in models])
    marks = np.where(said == wanted, "right", "wrong")  # (models, questions)
    marks = np.where(said == world.DONT_KNOW, "declined", marks)
    say(f"{'set':<28}{'questions':>10}{'right':>18}{'declined':>18}{'wrong':>18}")
    for name in dict.fromkeys(sets):
        marks_here = marks[:, sets == name]
        line = f"{printable(name):<28}{marks_here.shape[1]:>10}"
        for mark in ("right", "declined", "wrong"):
            percents = 100 * (marks_here == mark).mean(axis=1)
            line += f"{' -> '.join(f'{percent:.1f}' for percent in percents):>18}"
        say(line)
    if len(models) > 1:
        say(f"{100 * (said[0] == said[1]).mean():.1f} % of these answers are the same as before")
    for example, answer in zip(test, said[-1].tolist()):
        if example.set == CORRECTED:
            say(f"{example.chosen[-2].text!r}: now {answer!r}")

# ---------------------------------------------------------------- preferences
def log_probs(params, x, y, w, cfg, key=None):
    """Log-probability of what is trained in each row: x, y, w (N, T) -> (N,)."""
    return -(gpt.token_losses(params, x, y, cfg, key) * w).sum(-1)

def dpo_loss(params, batch, key, cfg):
    """Direct preference optimisation (arXiv 2305.18290) -> (sum over pairs, number of pairs).
    What a pair gives is -log sigmoid(beta (gain of the chosen - gain of the rejected)), equation 7.
    A gain is the log-probability of an answer now minus that before training.

    batch: x, y, w (N, T), of which the first n rows are answers, the others pretraining text:

        chosen, rejected, chosen, rejected, ..., text, text, ...

    and reference (n,), the log-probabilities of the answers before training. Two things are added
    to the loss of the paper: the loss per token of the chosen answers, or they too would become
    less probable (arXiv 2404.19733), and that of the text."""
    x, y, w, reference = batch
    n = len(reference)
    logp = log_probs(params, x, y, w, cfg, key)  # (N,)
    per_token = logp / jnp.maximum(1, w.sum(-1))
    gains = logp[:n] - reference
    # A softmax over two numbers a, b is sigmoid(a - b) for the first of them.
    preference = -jax.nn.log_softmax(cfg.beta * gains.reshape(-1, 2))[:, 0]  # (n / 2,)
    imitation = -per_token[:n].reshape(-1, 2)[:, 0]
    replay = -per_token[n:].mean() if n < len(x) else 0  # one number, the same for each pair
    return (preference + imitation + replay).sum(), jnp.float32(n // 2)

def corrections_in(path, tokenizer, T):
    """What /better wrote -> preferences, the last one of each question. If the context has no room
    for the conversation before it, the question stands alone."""
    last = {}
    for example in read_examples([path], PREFERENCE):
        dialogues = example.dialogues
        if any(len(render(dialogue, tokenizer)[0]) > T for dialogue in dialogues):
            dialogues = [dialogue[-2:] for dialogue in dialogues]
        asked = str(dialogues[0][:-1])
        last[asked] = Example(dialogues, example.source, CORRECTED)
    return [*last.values()]

def enough_of(corrections, n_others):
    """Corrections again and again, half the time in other words (reworded). A reworded one stands
    alone, without what was said before."""
    examples = []
    # Eight or more become a fifth of all. One alone, as often, would be the answer to all the like.
    times = 1 + n_others // (4 * max(8, len(corrections)))
    for example in corrections * times:
        question, answer = example.chosen[-2:]
        asked = Message("user", world.reworded(question.text, answer.text))
        if asked != question:
            example = replace(example, dialogues=[[asked, d[-1]] for d in example.dialogues])
        examples.append(example)
    return examples

# Of old answers. With the corrections these are about 2,940 examples; 200 steps take 3,800: 19 in
# each, for of the batch of 24 a fifth is text.
N_KEPT = 2350

def unchanging(examples):
    """Examples whose answers are to stay as they are -> preferences. In the rejected dialogue no
    token is trained, so its log-probability counts as 0 before and after. What is left of
    equation 7 is -log sigmoid(beta gain of the chosen): it rises when that becomes less probable.
    """
    preferences = []
    for example in examples[:N_KEPT]:
        nothing = [message._replace(trained=False) for message in example.chosen]
        preferences.append(replace(example, dialogues=[example.chosen, nothing]))
    return preferences

def old_answers(cfg, about, tokenizer, pairs):
    """Questions whose answers DPO is to leave as they are -> (examples to train on, others for the
    test). They are the user's pairs or, if none are named, those that the model was fine-tuned on,
    or else the built-in ones."""
    if not pairs:
        learned = about["config"].get("pairs", ())
        gone = [path for path in learned if not Path(path).exists()]  # or it was a pipe
        if gone:
            raise InputError(f"{gone[0]}: {cfg.init} was fine-tuned on it, and it is not here; name"
                             " those questions: python sft.py PAIRS --dpo")
        pairs = read_examples(learned)
    if not pairs:
        examples, test = built_in(cfg)
        # Every sixth question of the test: about 500, which take a few seconds.
        return that_fit(examples, tokenizer, cfg.block_size), test[::6]
    fitting = that_fit(pairs, tokenizer, cfg.block_size)
    shuffled = np.random.default_rng(cfg.seed).permutation(fitting)
    examples = [replace(example, set="yours, not learned now") for example in shuffled]
    n_test = min(len(examples) // 10, 100)
    return examples[n_test:], examples[:n_test]

def learn_answers(cfg, pairs, test):
    """What is learned by imitation -> (examples, test): the user's, or the built-in ones."""
    if pairs:
        return pairs, test
    examples, built_in_test = built_in(cfg)
    if not examples:
        raise InputError(f"no {cfg.data_dir}/qa.jsonl: name a file of questions and answers")
    return examples, test or built_in_test

def learn_preferences(cfg, pairs, preferences, feedback, test):
    """What DPO learns from -> (examples, test, the parameters before).

    Given preferences, from the file after --dpo: learn these, and keep the answers of pairs.
    Else: learn the corrections in the file feedback; keep the answers of pairs or, if there are no
    pairs, of old_answers(). The corrections come last in the test, which is that of --eval or from
    old_answers()."""
    # Not the state in main, which is half trained already on --resume.
    state, about, tokenizer = load_start(cfg.init, cfg)
    before = state["params"]
    if preferences:
        return preferences + unchanging(pairs), test, before

    corrections = corrections_in(feedback, tokenizer, cfg.block_size)
    corrected = {example.chosen[-2].text for example in corrections}
    old, old_test = old_answers(cfg, about, tokenizer, pairs)
    old = [example for example in old
           if corrected.isdisjoint(message.text for message in example.chosen)]
    examples = unchanging(old)
    if not examples:
        say("nothing keeps the other answers as they are, so they will change; to keep them name"
            " questions and answers: python sft.py pairs.jsonl --dpo")
    world.rng.seed(cfg.seed)  # of reworded: a resumed run has the same examples
    examples += enough_of(corrections, len(examples))
    return examples, (test or old_test) + corrections, before

# ---------------------------------------------------------------- records: JSON of many shapes
# Skip this at first: read_examples gives a list of Example.
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # by their other names
# Where the parts of a dialogue are looked for. If a field for answers holds the whole dialogue,
# those for questions are not looked at. "conversations" is in both lists:
#     {"conversations": [question, answer]}     {"conversations": [question], "chosen": answer, ...}
SYSTEM_FIELDS = ["system", "system_prompt"]
QUESTION_FIELDS = ["history", "conversations", "prompt", "instruction", "question", "input",
                   "context"]
ANSWER_FIELDS = ["messages", "conversations", "response", "output", "completion", "answer"]
OURS = {"built_in", "set", "attribute", "value"}  # fields of prepare.py's own questions

def text_of(content):
    """What a turn says: text, parts of text, a number or true; null and NaN say nothing.

    >>> text_of([{"text": "H"}, {"text": "i"}]), text_of(True), text_of(None)
    ('Hi', 'true', '')
    """
    if content is None or content != content:
        return ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return json.dumps(content) if isinstance(content, (int, float)) else plain(content)

def message_of(turn):
    """OpenAI's {"role", "content"} or ShareGPT's {"from", "value"} as a message. An answer of
    "weight" 0 is not trained. A turn that calls a tool has the role "tool"."""
    role = turn.get("role", turn.get("from"))
    if turn.get("tool_calls"):
        role = "tool"
    text = text_of(turn.get("content", turn.get("value")))
    return Message(ROLES.get(role, role), text, turn.get("weight", 1) != 0)

def take(record, fields, role):
    """Take fields out of a record -> what they say, as messages. A field holds a text, said in this
    role, or a list of turns. In LLaMA-Factory's history a turn is [question, answer]."""
    messages = []
    for name in fields:
        said = record.pop(name, None)
        if isinstance(said, dict):  # a lone turn
            said = [said]
        if not isinstance(said, list):
            said = [{"role": role, "content": said}] if text_of(said).strip() else []
        for turn in said:
            if name == "history" and isinstance(turn, list):
                question, answer = map(text_of, turn)
                messages += [Message("user", question), Message("assistant", answer, True)]
            else:
                messages.append(message_of(turn))
    return messages

def take_turns(record, answer_fields):
    """Take all turns out of a record -> messages. It holds a list of turns:

        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}

    or fields of which turns are made: {"instruction": "Add", "input": "2 + 2", "output": "4"}"""
    system = take(record, SYSTEM_FIELDS, "system")
    answered = []
    for name in answer_fields:
        turns = take(record, [name], "assistant")
        if any(turn.role == "user" for turn in turns):
            return [said for said in system if said not in turns] + turns
        answered += turns
    return system + take(record, QUESTION_FIELDS, "user") + answered

def dialogue_of(turns, source):
    """Messages of any order -> question, answer, question, answer. What is said before an answer is
    one question."""
    dialogue = []
    asked, is_asked = [], False  # since the last answer: texts, whether the user spoke
    for turn in turns:
        if turn.role in ("user", "system"):
            if turn.text:
                asked.append(turn.text)
            is_asked |= turn.role == "user"
        elif turn.role != "assistant" or not (asked and is_asked):
            raise ValueError("without questions and answers in turn")
        elif not turn.text.strip():
            raise ValueError("with an empty answer")
        else:
            question = in_small_letters("\n\n".join(asked))
            dialogue += [Message("user", question), turn]
            asked, is_asked = [], False
    if asked and dialogue:
        count("last question(s) without an answer", source)
    return dialogue

# Kinds of records: for each dialogue that one gives, the fields in which its answer is looked for.
IMITATION = [ANSWER_FIELDS]  # one dialogue
PREFERENCE = [["chosen"], ["rejected"]]  # two dialogues

def example_of(record, kind, source):
    """A record -> an example. Of a preference only the last message is trained."""
    if isinstance(record, list):
        record = {"messages": record}
    unused = record.keys() - OURS
    dialogues = []
    for answer_fields in kind:
        rest = dict(record)
        dialogue = dialogue_of(take_turns(rest, answer_fields), source)
        unused &= rest.keys()  # what no turn was taken out of is left in rest
        if kind is PREFERENCE:
            dialogue[:-1] = [message._replace(trained=False) for message in dialogue[:-1]]
        if dialogue in dialogues or not any(message.trained for message in dialogue):
            raise ValueError("without an answer to train")
        dialogues.append(dialogue)
    count_fields(unused, source)
    return Example(dialogues, source, str(record.get("set", "all")))

def read_examples(paths, kind=IMITATION):
    """Files -> [example]. What cannot be one is left out, and one line tells of it."""
    examples = []
    for path in paths:
        for record, source in read_json(read_lines(path)):
            try:
                examples.append(example_of(record, kind, source))
            except ValueError as e:
                count(f"record(s) {e}", source)
            except (AttributeError, LookupError, TypeError):  # anything can be in it
                count("record(s) of no known shape", source)
    if paths and not examples:
        raise InputError(f"{paths[0]}: no question with an answer in it; left out: {list_of()}")
    report()
    return examples

def built_in(cfg):
    """The questions of prepare.py -> (to learn from, to test with)."""
    files = [Path(cfg.data_dir, name) for name in ("qa.jsonl", "qa_test.jsonl")]
    return [read_examples([file] if file.exists() else []) for file in files]

# ---------------------------------------------------------------- main
@dataclass(frozen=True)
class Config(gpt.Config):
    pairs: str = setting((), "questions and answers [built-in ones]", nargs="*", positional=True)
    init: str = setting("", "checkpoint to start from; nothing: base.npz in out_dir, for DPO chat")
    eval: str = setting((), "questions to test with; without pairs nothing is trained", nargs=1)
    show: int = setting(0, "print this many examples with what is trained, and stop")
    # None: no DPO; "": from the corrections; else the name of a file
    dpo: str = setting(None, "learn preferences [the corrections]", nargs="?", const="")
    weight_decay: float = setting(0.3, "of matrices [with --dpo: 0]")
    beta: float = setting(0.1, "DPO: the larger, the closer it stays to what it was")
    batch_size: int = setting(16, "examples and texts in a micro-batch [with --dpo: 24]", low=1)
    max_steps: int = setting(2200, "optimiser steps [with --dpo: 200]", low=1)
    learning_rate: float = setting(2e-3, "at its peak; then a cosine to 0 [with --dpo: 3e-4]")

def make_if_missing(path):
    """Have a default checkpoint made or finished, by the script that writes it: base.npz by
    gpt.main, chat.npz by main below, which in turn calls this for base.npz."""
    base = path.with_name("base.npz")
    script = gpt.main if path == base else main
    if not path.exists():
        say(f"no {path} yet: it is made first")
        return script([])
    about = gpt.load_checkpoint(path)[1]
    if about["step"] < about["config"]["max_steps"]:
        say(f"{path} is unfinished: going on with it")
        script(["--resume"])
    elif base.exists() and base.stat().st_mtime > path.stat().st_mtime:
        say(f"{base} is newer than {path}: python sft.py would fine-tune it")

def load_start(path, cfg):
    """A checkpoint to start from -> (state, about, tokenizer). A base model has never seen the ids
    of <|user|> and <|assistant|>: their embeddings begin near the mean of the others."""
    state, about, model, tokenizer = gpt.load_checkpoint(path)
    if about["kind"] == "base":
        wte = state["params"]["wte"]
        about["kind"] = "chat"
        noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, model.n_embd))
        wte[[USER, ASSISTANT]] = wte.mean(0) + noise
    return state, about, tokenizer

def text_to_replay(cfg, about):
    """The text that the base was trained on, if it is still there; else nothing."""
    path = Path(cfg.data_dir, "train.bin")
    if path.exists():
        text_ids = np.fromfile(path, "<u2")
        if zlib.crc32(text_ids) == about.get("text"):
            return text_ids
    say(f"{cfg.data_dir} is not the text of {cfg.init}, so none of it is replayed")
    return []

def with_fixed_rows(loss, text_ids, cfg):
    """-> objective(params, batch, key): the loss, but the embedding of a token that is in the text
    gets no gradient. Otherwise the names that are asked about would move, and those of B, which are
    never asked, would stay where they are: what is learned about the first would not fit them."""
    frozen = np.isin(np.arange(cfg.vocab_size), text_ids)

    @jax.jit
    def objective(params, batch, key):
        fixed = jax.lax.stop_gradient(params["wte"])
        wte = jnp.where(frozen[:, None], fixed, params["wte"])
        return loss(params | {"wte": wte}, batch, key, cfg)

    return objective

def learn_words(about, tokenizer, text_ids, examples):
    """Note in about the words of the text and of the examples, {word in small letters: how often it
    is there}, for as_read. Without the text nothing is noted, or all its other words would be taken
    for slips."""
    if not len(text_ids):
        return
    texts = [message.text for example in examples for message in example.chosen]
    step = max(1024, len(text_ids) // 4096)  # of a long text 4 M tokens, from everywhere in it
    for start in range(0, len(text_ids), step):
        texts.append(tokenizer.decode(text_ids[start:start + 1024].tolist()))
    words = Counter(map(str.lower, re.findall(A_WORD, "\n".join(texts))))
    noted = about.get("words", {})  # by an earlier fine-tuning: those are not counted again
    about["words"] = {**words, **noted}

def divided(examples, tokenizer, cfg):
    """Examples -> rows to train on and rows held out: a twentieth if they are the user's own. (The
    built-in questions have a test. They also are conversations already, and are not joined.)"""
    by_imitation = cfg.dpo is None
    users_own = cfg.pairs if by_imitation else cfg.dpo
    n_held = min(len(examples) // 20, 512) if users_own else 0
    say(f"{len(examples)} examples, {n_held} of them held out")
    held_out, trained = examples[:n_held], examples[n_held:]
    if by_imitation and cfg.pairs:
        trained = joined(trained, tokenizer, cfg.block_size, np.random.default_rng(cfg.seed))
    return [rows_of(some, tokenizer, cfg.block_size) for some in (trained, held_out)]

def fine_tune(cfg, state, about, tokenizer, examples, text_ids, path, before=None):
    """Train on examples, in their order, and on the text -> the parameters after it. before: the
    parameters before DPO; without them it is trained by imitation."""
    rows, held_out = divided(examples, tokenizer, cfg)
    # On --resume the rows must be the same, and so must the model that DPO compares with.
    weights = before["blocks"][0]["attn"]["wqkv"] if before else b""
    checksum = zlib.crc32(rows, zlib.crc32(held_out, zlib.crc32(weights)))
    # A fifth of each batch is pretraining text, so that it is not forgotten (arXiv 2503.21676).
    n_replayed = round(cfg.batch_size / 5) if len(text_ids) else 0
    n_new = cfg.batch_size - n_replayed
    objective = with_fixed_rows(dpo_loss if before else gpt.loss, text_ids, cfg)
    reference_log_probs = jax.jit(partial(log_probs, cfg=cfg))

    def batch_of(some):  # (m, n, 3, T) -> x, y, w, each (m n, T)
        x, y, w = some.reshape(-1, 3, cfg.block_size).swapaxes(0, 1)
        batch = [np.int32(x), np.int32(y), np.float32(w)]
        return [*batch, reference_log_probs(before, *batch)] if before else batch

    def batch_at(number):
        places = np.arange(n_new) + number * n_new  # the next so many; they have been shuffled
        batch = batch_of(rows.take(places, 0, mode="wrap"))
        if n_replayed:
            replayed = gpt.random_batch(text_ids, n_replayed, cfg.block_size, cfg.seed, number)
            # To x, y and w; what is replayed has no reference.
            batch[:3] = [np.concatenate(parts) for parts in zip(batch, replayed)]
        return batch

    def validate(params):  # -> (mean loss of what is held out, None for the bits a byte)
        if not len(held_out):
            return None, None
        parts = np.array_split(held_out, len(held_out) // 32 + 1)
        total, n = np.sum([objective(params, batch_of(part), None) for part in parts], axis=0)
        return float(total / n), None

    if not cfg.resume:
        about["data"] = checksum
        if len(held_out):
            say(f"loss of what is held out: {validate(state['params'])[0]:.3f} before")
    if about["data"] != checksum:
        raise InputError(f"{path}: was begun with other examples, or from another model; start"
                         " afresh without --resume")
    return gpt.train(cfg, state, about, objective, batch_at, validate, path)["params"]

# With --dpo these are the defaults.
DPO = {"max_steps": 200, "learning_rate": 3e-4, "batch_size": 24, "weight_decay": 0.0}

def resume(cfg, given, path):
    """Go on with the stopped run at path -> (its settings, state, about, tokenizer)."""
    state, about, _, tokenizer = gpt.load_checkpoint(path, to_resume=True)
    if not cfg.dpo:  # a bare --dpo says which run it is; the checkpoint knows its file
        given = given - {"dpo"}
    return gpt.inherit(cfg, given, about, path), state, about, tokenizer

def begin(cfg, given, start):
    """Begin with the model in the checkpoint start -> (settings, state, about, tokenizer)."""
    # Several processes would each make it.
    if jax.process_count() == 1 and not given & {"init", "data_dir", "out_dir"}:
        make_if_missing(start)
    state, about, tokenizer = load_start(start, cfg)
    cfg = replace(cfg, init=str(start))
    return gpt.inherit(cfg, given, about, start), state, about, tokenizer

def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    by_dpo = cfg.dpo is not None
    path = Path(cfg.out_dir, "dpo.npz" if by_dpo else "chat.npz")
    gpt.join(cfg)
    if cfg.resume:
        cfg, state, about, tokenizer = resume(cfg, given, path)
    elif by_dpo:
        cfg = replace(cfg, **{name: DPO[name] for name in DPO.keys() - given})
    # Read now, so that a missing file is found before a base is trained.
    pairs = read_examples(cfg.pairs)
    test = read_examples(cfg.eval)
    preferences = read_examples([cfg.dpo], PREFERENCE) if cfg.dpo else []
    feedback = Path(cfg.out_dir, "feedback.jsonl")
    if by_dpo and not preferences and not feedback.exists():
        raise InputError(f"no {feedback}: /better in the chat writes it; or name preferences")

    only_test = test and not (pairs or by_dpo or cfg.resume)
    if not cfg.resume:
        default_start = "chat.npz" if by_dpo or only_test else "base.npz"
        start = cfg.init or Path(cfg.out_dir, default_start)
        cfg, state, about, tokenizer = begin(cfg, given, start)
    gpt.check_device(cfg.dropout)
    if only_test:
        return examine([state["params"]], cfg, about, tokenizer, test)
    before = None
    if by_dpo:
        if Path(cfg.init) == path:
            raise InputError(f"--init {path}: would be overwritten, but DPO compares with it")
        examples, test, before = learn_preferences(cfg, pairs, preferences, feedback, test)
    else:
        examples, test = learn_answers(cfg, pairs, test)
    text_ids = text_to_replay(cfg, about)
    if not cfg.resume:
        learn_words(about, tokenizer, text_ids, examples)
    examples = that_fit(examples, tokenizer, cfg.block_size)
    if cfg.show:
        rows = rows_of(examples[:cfg.show], tokenizer, cfg.block_size)
        return show(np.concatenate(rows), tokenizer)
    examples = np.random.default_rng(cfg.seed).permutation(examples)
    params = fine_tune(cfg, state, about, tokenizer, examples, text_ids, path, before)
    if test:
        examine([before, params] if by_dpo else [params], cfg, about, tokenizer, test)
    say(f"checkpoint: {path}\nnext: python chat.py {path}")

if __name__ == "__main__":
    run(main)

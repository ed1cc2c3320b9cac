"""Supervised fine-tuning: from a model that continues text to one that answers. Then DPO.

    python sft.py                        # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --eval held_out.jsonl
    python sft.py --show 3               # three examples, what is trained in brackets, then stop
    python sft.py --eval questions.jsonl # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                  # what was corrected in the chat, out/chat.npz -> dpo.npz

Pretraining gave the model its knowledge; here it learns the manner. The loop is that of gpt.py, but
only the tokens of answers have weight. Reading order: records, rows, answers, DPO, main.
"""
import json, zlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, groupby
from pathlib import Path

import gpt
import jax
import jax.numpy as jnp
import numpy as np
from data.world import DONT_KNOW
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, count, list_of, printable
from prepare import read_flags, read_lines, report, run, setting, show_progress

# ---------------------------------------------------------------- records: JSON of many shapes
ASKS, ANSWERS = {"system", "developer", "user", "human"}, {"assistant", "gpt"}  # roles
QUESTION = ("system", "prompt", "instruction", "input", "context")  # fields, put together
ANSWER = [("messages", "conversations", "response", "output", "completion")]  # for one answer
PREFERENCE = [("chosen",), ("rejected",)]  # for two

def read_json(path):
    """JSON lines or one JSON list -> (record, "file:line")."""
    lines = [(line, source) for line, source in read_lines(path) if line.strip()]
    is_list = bool(lines) and lines[0][0].lstrip().startswith("[")
    if is_list:
        lines = [("".join(line for line, _ in lines), path)]
    for text, source in lines:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            count("part(s) that are not JSON", source)
            continue
        for i, record in enumerate(found if is_list else [found], 1):
            yield record, f"{path}: record {i}" if is_list else source

def turns_of(record, answers):
    """A record -> its turns, OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"},
    ...]. answers: the fields that hold its answer or the whole conversation."""
    turns = []
    for role, names in ("user", QUESTION), ("assistant", answers):
        for part in (record[name] for name in names if name in record):
            part = part if isinstance(part, list) else [{"role": role, "content": part}]
            # A conversation may begin with its prompt.
            turns = part if part[:len(turns)] == turns else turns + part
    return turns

def messages_of(turns, source):
    """Turns -> [(role, text, trained), ...] going user, assistant, user, assistant. What is said
    before an answer is one question; an answer of "weight" 0 is not trained."""
    messages, asked = [], []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        if isinstance(text, list):
            text = "".join(part["text"] for part in text)
        if role in ASKS:
            asked += [text] if text else []
        elif role not in ANSWERS or turn.get("tool_calls") or not asked:
            raise ValueError("that are no conversation of questions and answers in turn")
        elif not text.strip():
            raise ValueError("with an empty answer")
        else:
            messages.append(("user", "\n\n".join(asked), False))
            messages.append(("assistant", text, turn.get("weight", 1) != 0))
            asked = []
    if asked and messages:
        count("last question(s) without an answer", source)
    return messages

def read_records(paths, kind=ANSWER):
    """Files -> [(messages for each answer, record, "file:line")]. What cannot be a conversation is
    left out, and one line tells of it. Of a preference only the last message is trained."""
    records = []
    for record, source in chain(*map(read_json, paths)):
        try:
            found = [messages_of(turns_of(record, names), source) for names in kind]
            if kind is PREFERENCE:
                found = [[(role, text, i == len(messages) - 1)
                          for i, (role, text, _) in enumerate(messages)] for messages in found]
            if found[1:] == found[:1] or not all(any(m[2] for m in some) for some in found):
                raise ValueError("without an answer to train")
            records.append((found, record, source))
        except ValueError as e:
            count(f"record(s) {e}", source)
        except (AttributeError, LookupError, TypeError):  # anything can be in a JSON file
            count("record(s) of no known shape", source)
    if paths and not records:
        raise InputError(f"{paths[0]}: no question with an answer in it; left out: {list_of()}")
    report()
    return records

# ---------------------------------------------------------------- rows: what a step is trained on
def render(messages, tokenizer):
    """Messages -> (ids, which of them are trained):

        [("user", "hi", False), ("assistant", "ho", True)]
        ->  <|user|>  hi  <|assistant|>  ho   <|end|>
            False     ..  False          True True

    Put together from ids, so that no text can forge a special token. A text is encoded with a space
    before it: its first word is then the same token as within a text. Messages that end in a
    question end in <|assistant|>: the prompt of chat.py."""
    ids, trained = [], []
    for role, text, is_trained in messages:
        words = tokenizer.encode(f" {text}")
        ids += [*words, END] if role == "assistant" else [USER, *words, ASSISTANT]
        trained += [is_trained] * (len(ids) - len(trained))
    return ids, trained

def shift(ids, trained, T):
    """shift([5, 6, 7], [False, False, True], 4) -> x [5, 6, 0, 0], y [6, 7, 0, 0], w [0, 1, 0, 0]:
    w is 1 where the *target* y is trained."""
    row = np.zeros((3, T), np.uint16)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row

def rows_of(records, tokenizer, T):
    """Records with n answers each -> rows (N, n, 3, T): x, y, w of those that fit the context."""
    rows = []
    for found, _, source in records:
        rendered = [render(messages, tokenizer) for messages in found]
        if max(len(ids) for ids, _ in rendered) > T:
            count(f"record(s) longer than the context of {T} tokens", source)
        else:
            rows.append([shift(*answer, T) for answer in rendered])
    if not rows:
        raise InputError(f"no example fits the context of {T} tokens; use a larger --block_size")
    report()
    return np.array(rows)

def show(row, tokenizer):
    """A row as text; what is trained is in brackets."""
    spelled = [name.encode() for name in SPECIAL] + tokenizer.bytes[len(SPECIAL):]
    x, y, w = row
    text = ""
    n = np.flatnonzero(x)[-1] + 1  # END, which is 0, is only a target
    for trained, part in groupby(zip([x[0], *y[:n]], [0, *w[:n]]), lambda token: token[1]):
        words = b"".join(spelled[id] for id, _ in part)  # a character may be several tokens
        words = printable(words.decode("utf-8", "replace"))
        text += f"[{words}]" if trained else words
    return text

# ---------------------------------------------------------------- answers and their marks
def answer_all(params, cfg, tokenizer, questions, temperature=0.0):
    """Answers to lists of messages, 64 at a time -> [text]."""
    generate, answers = gpt.make_generator(cfg), []
    rng = np.random.default_rng(cfg.seed)
    for start in range(0, len(questions), 64):
        prompts = [render(messages, tokenizer)[0] for messages in questions[start:start + 64]]
        steps = generate(params, prompts, cfg.block_size, rng, temperature=temperature)
        rows = zip(*(new for new, _ in steps))
        answers += [tokenizer.decode(ids).removeprefix(" ") for ids in rows]
        done = len(answers)
        show_progress(f"answering: {done} of {len(questions)}", last=done == len(questions))
    return answers

def grade(params, cfg, tokenizer, test, column):
    """Answer the test's questions greedily; record[column] becomes "right" (the whole answer, word
    for word), "declined" or "wrong"."""
    said = answer_all(params, cfg, tokenizer, [messages[:-1] for [messages], *_ in test])
    for ([messages], record, _), answer in zip(test, said):
        record["said"] = answer
        right = answer.strip() == messages[-1][1].strip()
        record[column] = "declined" if answer == DONT_KNOW else "right" if right else "wrong"

def table(test, columns):
    """Print for each set of questions how many % of the answers were right, declined, wrong."""
    print(f"{'set':<24}{'questions':>10}{'right':>18}{'declined':>18}{'wrong':>18}")
    sets = {}
    for _, record, _ in test:
        sets.setdefault(str(record.get("set", "all")), []).append(record)
    for name, records in sets.items():
        line = f"{printable(name):<24}{len(records):>10}"
        for verdict in ("right", "declined", "wrong"):
            parts = [100 * np.mean([r[column] == verdict for r in records]) for column in columns]
            line += f"{' -> '.join(f'{part:.1f}' for part in parts):>18}"
        print(line)

# ---------------------------------------------------------------- DPO
def log_probs(params, x, y, w, cfg):
    """Log-probability of what is trained in each answer: x, y, w (n, 2, T) -> (n, 2)."""
    x, y = (a.reshape(-1, cfg.block_size) for a in (x, y))
    return -(gpt.token_losses(params, x, y, cfg).reshape(w.shape) * w).sum(-1)

def dpo_loss(params, batch, key, cfg, anchor=1.0):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) -> (sum, count). batch: x, y, w
    (n, 2, T), the chosen answer first, the log-probabilities (n, 2) that the model before training,
    the reference, gave them, and perhaps pretraining text, whose loss is added.

    `anchor` times the loss per token of the chosen answer is added too: its probability would
    otherwise fall along with that of the rejected one (arXiv 2404.19733)."""
    x, y, w, reference, *replayed = batch
    logp = log_probs(params, x, y, w, cfg)
    chosen, rejected = (cfg.beta * (logp - reference)).T
    margin = chosen - rejected  # -log sigmoid(margin) is softplus(-margin), here as Metal can do it
    top = jnp.maximum(0, -margin)
    loss = top + jnp.log(jnp.exp(-top) + jnp.exp(-margin - top))
    loss -= anchor * logp[:, 0] / w[:, 0].sum(-1)
    if replayed:
        nats, tokens = gpt.loss(params, replayed, key, cfg)
        loss += nats / tokens
    return loss.sum(), jnp.float32(len(x))

def built_in_preferences(cfg, params, tokenizer, alone):
    """Records of the built-in questions. Of what is known, the answer is chosen and "I do not know
    that." rejected; of what is not, that is chosen and rejected what the model makes up or, if it
    makes up nothing, the answer to another question. Beside corrections, not alone, they only keep
    the rest as it is, so what is rejected has no weight: to push it down would shift much."""
    path = Path(cfg.data_dir, "qa.jsonl")  # there is none with somebody's own text
    records = read_records([path] if path.exists() else [])
    found = [messages for [messages], *_ in records if len(messages) == 2]
    known = [messages for messages in found if messages[1][1] != DONT_KNOW][:1300]
    unknown = [messages for messages in found if messages[1][1] == DONT_KNOW][:700]
    said = [DONT_KNOW] * len(unknown)
    if alone:
        said = answer_all(params, cfg, tokenizer, [[question] for question, _ in unknown], 1.2)
    rejected = [DONT_KNOW] * len(known)
    for text, (_, another) in zip(said, cycle(known)):
        rejected.append(another[1] if text.strip() in ("", DONT_KNOW) else text)
    return [([[question, answer], [question, ("assistant", text, alone)]], {}, "")
            for (question, answer), text in zip(known + unknown, rejected)]

# ---------------------------------------------------------------- main
@dataclass(frozen=True)
class Config(gpt.Config):
    pairs: str = setting((), "questions and answers; nothing: the built-in ones", nargs="*",
                         positional="pairs", metavar="PAIRS")
    init: str = setting("", "checkpoint to start from; nothing: out/base.npz, for DPO chat.npz")
    eval: str = setting((), "questions to test with; without PAIRS nothing is trained", nargs=1)
    show: int = setting(0, "print this many examples with what is trained, and stop")
    dpo: str = setting(None, "train on preferences; no file: corrections and built-in ones",
                       nargs="?", const="")
    weight_decay: float = setting(0.0, "of matrices")
    beta: float = setting(0.1, "DPO: the larger, the closer it stays to what it was")
    batch_size: int = setting(48, "rows in a micro-batch", low=1)
    max_steps: int = setting(1200, "optimiser steps [with --dpo: 200]", low=1)
    learning_rate: float = setting(2e-3, "at its peak; then along a cosine to 5 % [--dpo: 2e-4]")

def make_if_missing(path, script):
    """Run the main of the script that makes a default input, unless it is there and finished; for
    an input that was named there is none."""
    if script and not path.exists():
        print(f"no {path} yet: it is made first")
        return script([])
    about, base = gpt.load_checkpoint(path)[1], path.with_name("base.npz")
    if "base" in about and base.exists():
        if about["base"] != zlib.crc32(gpt.load_checkpoint(base)[0]["params"]["wte"]):
            print(f"{path} comes from another base than {base} is now")
    if script and about["step"] < about["config"]["max_steps"]:
        print(f"{path} is unfinished: going on with it")
        script(["--resume"])

def fine_tune(cfg, state, about, tokenizer, rows, held, path, before=None):
    """Train on all rows but the first `held` -> the parameters after it. By imitation or, given the
    parameters before, the reference, by DPO."""
    T = cfg.block_size
    rest = rows[held:]
    old = cfg.batch_size // 4  # rows of pretraining text, against forgetting (arXiv 2503.21676)
    reference = jax.jit(partial(log_probs, cfg=cfg))
    source = Path(cfg.data_dir, "tokenizer.json")
    if source.exists() and source.read_text("utf-8") == about["tokenizer"]:
        text = gpt.load_tokens(source.with_name("train.bin"), tokenizer, T + 1)
    else:
        old = 0
        print(f"{source.parent} is not the text of {cfg.init}, so none of it is replayed")

    @jax.jit
    def objective(params, batch, key):
        if before:
            return dpo_loss(params, batch, key, cfg)
        # The embedding stays, or names that are never asked would fall behind those that are.
        params = params | {"wte": jax.lax.stop_gradient(params["wte"])}
        return gpt.loss(params, batch, key, cfg)

    def batch_of(rows):
        x, y, w = rows.transpose(2, 0, 1, 3)
        batch = np.int32(x), np.int32(y), np.float32(w)
        return [*batch, reference(before, *batch)] if before else [a[:, 0] for a in batch]

    def batch_at(number):
        new = cfg.batch_size - old
        chosen = np.arange(number * new, (number + 1) * new) % len(rest)  # main has shuffled them
        batch = batch_of(rest[chosen])
        if old:
            replayed = gpt.random_batch(text, old, T, cfg.seed, number)
            batch = [*batch, *replayed] if before else [*map(np.concatenate, zip(batch, replayed))]
        return batch

    def validate(params):
        if not held:
            return "", ""
        parts = np.array_split(rows[:held], held // 32 + 1)  # of two sizes: compiled twice
        sums = [objective(params, batch_of(part), None) for part in parts]
        total, number = np.sum(jax.device_get(sums), axis=0)
        return float(total / number), ""

    data = zlib.crc32(rows)
    if not cfg.resume:
        wte = state["params"]["wte"]
        about.setdefault("base", zlib.crc32(wte))
        if about["kind"] == "base":  # the roles' ids were reserved, never seen: begin amid others
            noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, cfg.n_embd))
            wte[[USER, ASSISTANT]] = wte.mean(0) + noise
        about.update(kind="chat", data=data)
        if held:
            print(f"loss of what is held out: {validate(state['params'])[0]:.3f} before")
    if about["data"] != data:
        raise InputError(f"{path}: was begun with other examples; start afresh without --resume")
    return gpt.train(cfg, state, about, objective, batch_at, validate, path)["params"]

def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    dpo, out_dir = cfg.dpo is not None, Path(cfg.out_dir)
    path = out_dir / ("dpo.npz" if dpo else "chat.npz")
    if cfg.resume:
        state, about, _, tokenizer = gpt.load_checkpoint(path, whole=True)
        cfg = gpt.inherit(cfg, given if cfg.dpo else given - {"dpo"}, about, path)
    elif dpo:
        unset = {"max_steps": 200, "learning_rate": 2e-4}
        cfg = replace(cfg, **{k: v for k, v in unset.items() if k not in given})
    own = [*cfg.pairs, *filter(None, [cfg.dpo])]
    # What is wrong with these is told now, not after a pretraining.
    records = read_records(own, PREFERENCE if dpo else ANSWER)
    test = read_records(cfg.eval)
    only_test = test and not (own or dpo or cfg.resume)
    if not cfg.resume:
        script, name = (main, "chat.npz") if dpo or only_test else (gpt.main, "base.npz")
        start = cfg.init or out_dir / name
        if not given & {"init", "data_dir", "out_dir"}:
            make_if_missing(start, script)
        state, about, _, tokenizer = gpt.load_checkpoint(start)
        cfg = gpt.inherit(replace(cfg, init=str(start)), given, about, start)
    gpt.join(cfg)
    gpt.check_device()
    if only_test:
        grade(state["params"], cfg, tokenizer, test, "now")
        return table(test, ["now"])
    if dpo and Path(cfg.init) == path:
        raise InputError(f"--init {path}: would be overwritten, but DPO compares with it")
    before = gpt.load_checkpoint(cfg.init)[0]["params"] if dpo else None
    corrections = []
    questions = Path(cfg.data_dir, "qa_test.jsonl")
    if not (own or test) and questions.exists():
        test = read_records([questions])[:: 6 if dpo else 1]  # a sixth is quick
    if dpo and not own:
        feedback = out_dir / "feedback.jsonl"
        corrected = read_records([feedback] if feedback.exists() else [], PREFERENCE)
        # Of each question the last one counts.
        corrections = [*{str(found[0][0][:-1]): found for found in corrected}.values()]
        records = built_in_preferences(cfg, before, tokenizer, alone=not corrections)
        if not records + corrections:
            raise InputError(f"{feedback}: no corrections yet; /better in chat.py makes them")
        # So often that they are a third of all.
        records += corrections * (1 + len(records) // (2 * len(corrections) + 1))
        test += [([chosen], {"set": "corrected by you"}, "") for (chosen, _), *_ in corrections]
    elif not own:
        records = read_records([questions.with_name("qa.jsonl")])
    rows = rows_of(records, tokenizer, cfg.block_size)
    if cfg.show:
        return print("\n".join(show(row, tokenizer) for some in rows[:cfg.show] for row in some))
    rows = np.random.default_rng(cfg.seed).permutation(rows)
    held = min(len(rows) // 20, 512) if own else 0  # not trained on, to measure with
    print(f"{len(rows)} examples, {held} of them held out, {rows[:, :, 2].sum()} trained tokens")
    if dpo and test:
        grade(before, cfg, tokenizer, test, "before")
    params = fine_tune(cfg, state, about, tokenizer, rows, held, path, before)
    if test:
        grade(params, cfg, tokenizer, test, "after")
        table(test, ["before", "after"] if dpo else ["after"])
    for [messages], record, _ in test[len(test) - len(corrections):]:
        print(f"{messages[-2][1]!r}: now {record['said']!r}")
    print(f"checkpoint: {path}\nnext: python chat.py {path}")

if __name__ == "__main__":
    run(main)

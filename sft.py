"""Supervised fine-tuning: from a model that continues text to one that answers. Then DPO.

    python sft.py                        # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --eval held_out.jsonl
    python sft.py --show 3               # three examples, what is trained in brackets, then stop
    python sft.py --eval questions.jsonl # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                  # what was corrected in the chat, out/chat.npz -> dpo.npz
    python sft.py mine.jsonl --dpo       # the same, and these answers are to stay as they are

Pretraining gave it knowledge, here it learns the manner: by the loop of gpt.py, where only tokens
of answers have weight. Reading order: records, rows, answers, preferences, main."""
import json, zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import gpt
import jax
import jax.numpy as jnp
import numpy as np
from data.world import DONT_KNOW, reworded, rng
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, count, list_of, not_used, plain
from prepare import printable, read_flags, read_json, read_lines, report, run, say, setting
from prepare import show_progress

# ---------------------------------------------------------------- records: JSON of many shapes
ASKS, ANSWERS = {"user", "human"}, {"assistant", "gpt"}  # roles
SYSTEM = {"system", "developer"}  # what such a turn says is put before the question
SYSTEM_FIELDS = ("system", "system_prompt")
QUESTION_FIELDS = ("prompt", "instruction", "question", "input", "context")
ANSWER = [("messages", "conversations", "response", "output", "completion", "answer")]  # for one
PREFERENCE = [("chosen",), ("rejected",)]  # for two
OURS = {"built_in", "set", "attribute", "value"}  # fields of prepare.py's own questions

def role_of(turn):
    return turn.get("role", turn.get("from"))

def text_of(content):
    """What a turn says: text, parts of text, a number or true; null and NaN say nothing."""
    if content is None or content != content:
        return ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return json.dumps(content) if isinstance(content, (int, float)) else plain(content)

def turns_of(record, answer_fields):
    """A record -> (its turns, OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"},
    ...], and the names of the fields that they are made of)."""
    def turns(role, names):
        found = []
        for value in map(record.get, names):
            if isinstance(value, list):
                found += value
            elif text_of(value).strip():
                found.append({"role": role, "content": value})
        return found

    earlier = turns("system", SYSTEM_FIELDS)
    for name in answer_fields:
        conversation = record.get(name)
        if isinstance(conversation, list) and any(role_of(turn) in ASKS for turn in conversation):
            if role_of(conversation[0]) in SYSTEM:
                earlier = []
            return earlier + conversation, {name, *SYSTEM_FIELDS}  # given whole
    for turn in turns("user", ["history"]):
        if isinstance(turn, list):  # LLaMA-Factory's [question, answer]
            question, answer = turn
            earlier += [{"role": "user", "content": question}]
            turn = {"role": "assistant", "content": answer}
        earlier.append(turn)
    used = {"history", *SYSTEM_FIELDS, *QUESTION_FIELDS, *answer_fields}
    return earlier + turns("user", QUESTION_FIELDS) + turns("assistant", answer_fields), used

def messages_of(turns, source):
    """Turns -> [(role, text, trained), ...] going user, assistant, user, assistant. What is said
    before an answer is one question; an answer of "weight" 0 is not trained."""
    messages, asked, is_asked = [], [], False
    for turn in turns:
        role, text = role_of(turn), text_of(turn.get("content", turn.get("value")))
        if role in ASKS | SYSTEM:
            asked += [text] if text else []
            is_asked |= role in ASKS
        elif role not in ANSWERS or turn.get("tool_calls") or not (asked and is_asked):
            raise ValueError("that are no conversation of questions and answers in turn")
        elif not text.strip():
            raise ValueError("with an empty answer")
        else:
            messages.append(("user", "\n\n".join(asked), False))
            messages.append(("assistant", text, turn.get("weight", 1) != 0))
            asked, is_asked = [], False
    if asked and messages:
        count("last question(s) without an answer", source)
    return messages

def read_records(paths, kind=ANSWER):
    """Files -> [(messages for each answer, record, "file:line")]. What cannot be a conversation is
    left out, and one line tells of it. Of a preference only the last message is trained."""
    records = []
    for record, source in (pair for path in paths for pair in read_json(read_lines(path))):
        try:
            record = {"messages": record} if isinstance(record, list) else record
            turns, used = zip(*(turns_of(record, names) for names in kind))
            found = [messages_of(some, source) for some in turns]
            if kind is PREFERENCE:
                found = [[(*m[:2], False) for m in some[:-1]] + some[-1:] for some in found]
            if found[1:] == found[:1] or not all(any(m[2] for m in some) for some in found):
                raise ValueError("without an answer to train")
            records.append((found, record, source))
            not_used.update(record.keys() - OURS - set().union(*used))
        except (ValueError, AttributeError, LookupError, TypeError) as e:  # anything can be in it
            count(f"record(s) {e if isinstance(e, ValueError) else 'of no known shape'}", source)
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

    Put together from ids: no text can forge a special token. Encoded with a space before it, its
    first word is the same token as within a text. With a question last: the prompt of chat.py."""
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
    rows, lengths = [], []
    for found, _, source in records:
        rendered = [render(messages, tokenizer) for messages in found]
        lengths.append(max(len(ids) for ids, _ in rendered))
        if lengths[-1] > T:
            count(f"record(s) longer than the context of {T} tokens", source)
        else:
            rows.append([shift(*answer, T) for answer in rendered])
    advice = ""
    if len(rows) < 0.75 * len(records):
        enough = -(-int(np.quantile(lengths, 0.9)) // 32) * 32
        advice = ("the context is that of the base: one that nine in ten fit is trained by python"
                  f" gpt.py --block_size {enough}")
    if not rows:
        raise InputError(f"no example fits the context of {T} tokens; {advice}")
    report()
    if advice:
        say(advice)
    return np.array(rows)

def show(row, tokenizer):
    """A row as text; what is trained is in brackets. A character may be several tokens."""
    spelled = [name.encode() for name in SPECIAL] + tokenizer.bytes[len(SPECIAL):]
    x, y, w = row
    text, n = "", np.flatnonzero(x)[-1] + 1  # END, which is 0, is only a target
    for trained, part in groupby(zip([x[0], *y[:n]], [0, *w[:n]]), lambda token: token[1]):
        words = printable(b"".join(spelled[id] for id, _ in part).decode("utf-8", "replace"))
        text += f"[{words}]" if trained else words
    return text

# ---------------------------------------------------------------- answers and their marks
def answer_all(params, cfg, tokenizer, asked, temperature=0.0):
    """Answers to the last question of lists of messages, 64 at a time -> [text]."""
    generate, rng, answers = gpt.make_generator(cfg), np.random.default_rng(cfg.seed), []
    for start in range(0, len(asked), 64):
        prompts = [render(some[:-1], tokenizer)[0] for some in asked[start:start + 64]]
        steps = generate(params, prompts, cfg.block_size, rng, temperature=temperature)
        answers += [tokenizer.decode(ids).strip() for ids in zip(*(new for new, _ in steps))]
        show_progress(f"answering: {len(answers)} of {len(asked)}", len(answers) == len(asked))
    return answers

def examine(models, cfg, tokenizer, test):
    """Let the models, one or that before and that after, answer a test and print for each set of it
    how many % are right, word for word, declined or wrong -> the answers of the last model."""
    dialogues = [messages for [messages], *_ in test]
    wanted = np.array([messages[-1][1].strip() for messages in dialogues])
    sets = np.array([str(record.get("set", "all")) for _, record, _ in test])
    said = np.array([answer_all(params, cfg, tokenizer, dialogues) for params in models])
    declined = said == DONT_KNOW
    right = (said == wanted) & ~declined  # (models, questions)
    say(f"{'set':<24}{'questions':>10}{'right':>18}{'declined':>18}{'wrong':>18}")
    for name in dict.fromkeys(sets):
        line = f"{printable(name):<24}{(sets == name).sum():>10}"
        for found in right, declined, ~(right | declined):
            parts = 100 * found[:, sets == name].mean(axis=1)
            line += f"{' -> '.join(f'{part:.1f}' for part in parts):>18}"
        say(line)
    if len(said) > 1:
        say(f"{100 * (said[0] == said[1]).mean():.1f} % of these answers are the same as before")
    return said[-1].tolist()

# ---------------------------------------------------------------- preferences
def log_probs(params, x, y, w, cfg, key=None):
    """Log-probability of what is trained in each row: x, y, w (N, T) -> (N,)."""
    return -(gpt.token_losses(params, x, y, cfg, key) * w).sum(-1)

def dpo_loss(params, batch, key, cfg):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) -> (sum, count). batch: x, y, w
    (N, T) of 2n answers, each chosen one before its rejected one, and of pretraining text, whose
    loss is added; reference (2n,): log-probabilities by the model before training. The loss per
    token of the chosen is added, or it too would become less probable (arXiv 2404.19733)."""
    x, y, w, reference = batch
    logp, n = log_probs(params, x, y, w, cfg, key), len(reference)
    per_token = logp / jnp.maximum(1, w.sum(-1))
    chosen, rejected = (cfg.beta * (logp[:n] - reference)).reshape(-1, 2).T
    margin = chosen - rejected  # -log sigmoid(margin) is softplus(-margin), here as Metal can do it
    top = jnp.maximum(0, -margin)
    loss = top + jnp.log(jnp.exp(-top) + jnp.exp(-margin - top))
    loss -= per_token[:n].reshape(-1, 2)[:, 0]
    if n < len(x):
        loss -= per_token[n:].mean()
    return loss.sum(), jnp.float32(n // 2)

def corrections_in(path, tokenizer, T):
    """What /better wrote -> preferences, the last of each question. One whose conversation is
    longer than the context stands alone."""
    def is_too_long(found):
        return max(len(render(messages, tokenizer)[0]) for messages in found) > T

    last = {}
    there = path.exists() and path.stat().st_size
    for found, record, source in read_records([path] if there else [], PREFERENCE):
        if is_too_long(found):
            found = [messages[-2:] for messages in found]
        if is_too_long(found):
            count(f"correction(s) longer than the context of {T} tokens", source)
        else:
            last[str(found[0][:-1])] = found, record, source
    report()
    return [*last.values()]

def enough_of(corrections, n_others):
    """Corrections again and again until they are a fifth of all; half the time in other words, then
    without what was said before (reworded)."""
    examples = []
    for found, *rest in corrections * (1 + n_others // (1 + 4 * len(corrections))):
        question, answer = found[0][-2:]
        asked = ("user", reworded(question[1], answer[1]), False)
        if asked != question:
            found = [[asked, messages[-1]] for messages in found]
        examples.append((found, *rest))
    return examples

def preferences_of(records, params, cfg, tokenizer, alone):
    """Records of questions and answers -> of preferences, of each the first question: the answer is
    chosen, what the model says itself is rejected if it is wrong: made up, or "I do not know that."
    of what it was told. Other rejected ones have no weight, nor has any beside corrections: these
    keep the rest as it is."""
    first = [(messages[:2], source) for [messages], _, source in records if messages[1][2]]
    known = [pair for pair in first if pair[0][1][1] != DONT_KNOW][:1300]
    unknown = [pair for pair in first if pair[0][1][1] == DONT_KNOW][:1050]
    kept = known + unknown
    said = [""] * len(kept)
    if alone:
        said = answer_all(params, cfg, tokenizer, [messages for messages, _ in kept], 1.2)
    preferences = []
    for (messages, source), own in zip(kept, said):
        question, answer = messages
        rejected = ("assistant", own, own not in ("", answer[1]))
        preferences.append(([messages, [question, rejected]], {}, source))
    return preferences

# ---------------------------------------------------------------- main
@dataclass(frozen=True)
class Config(gpt.Config):
    pairs: str = setting((), "questions and answers [built-in ones]", nargs="*", positional="pairs")
    init: str = setting("", "checkpoint to start from; nothing: out/base.npz, for DPO chat.npz")
    eval: str = setting((), "questions to test with; without pairs nothing is trained", nargs=1)
    show: int = setting(0, "print this many examples with what is trained, and stop")
    dpo: str = setting(None, "learn preferences [corrections, built-in ones]", nargs="?", const="")
    weight_decay: float = setting(0.0, "of matrices")
    beta: float = setting(0.1, "DPO: the larger, the closer it stays to what it was")
    batch_size: int = setting(16, "rows in a micro-batch [with --dpo: 24]", low=1)
    max_steps: int = setting(4000, "optimiser steps [with --dpo: 200]", low=1)
    learning_rate: float = setting(2e-3, "at its peak; then along a cosine to 5 % [--dpo: 3e-4]")

def make_if_missing(path, script):
    """Have script, a main, make or finish a default input; it is None for one that was named."""
    if script and not path.exists():
        say(f"no {path} yet: it is made first")
        return script([])
    about = gpt.load_checkpoint(path)[1]
    if "base" in about:
        bases = set()
        for base in path.parent.glob("base*.npz"):
            with suppress(InputError):  # it is only for the message
                bases.add(zlib.crc32(gpt.load_checkpoint(base)[0]["params"]["wte"]))
        if bases and about["base"] not in bases:
            say(f"{path} comes from another base than lies beside it now")
    if script and about["step"] < about["config"]["max_steps"]:
        say(f"{path} is unfinished: going on with it")
        script(["--resume"])

def load_start(path, cfg):
    """What a run starts from: a checkpoint; of a base model with roles, for their ids were reserved
    and never seen: they begin amid the others."""
    state, about, model, tokenizer = gpt.load_checkpoint(path)
    if about["kind"] == "base":
        wte, noise = state["params"]["wte"], np.random.default_rng(cfg.seed)
        about["base"] = zlib.crc32(wte)
        wte[[USER, ASSISTANT]] = wte.mean(0) + noise.normal(0, 0.02, (2, model.n_embd))
    return state, about, model, tokenizer

def text_to_replay(cfg, about, tokenizer):
    """The text that the base was trained on, if it is still there; else nothing."""
    path, vocabulary = Path(cfg.data_dir, "train.bin"), Path(cfg.data_dir, "tokenizer.json")
    if path.exists() and vocabulary.read_text("utf-8") == about["tokenizer"]:
        text = gpt.load_tokens(path, tokenizer, cfg.block_size + 1)
        if about.get("text") in (None, zlib.crc32(text)):
            return text
    say(f"{cfg.data_dir} is not the text of {cfg.init}, so none of it is replayed")
    return []

def fine_tune(cfg, state, about, tokenizer, rows, held, path, before=None):
    """Train on all rows (N, n, 3, T) but the first `held` -> the parameters after it: by imitation
    or, given the parameters before, the reference, by DPO."""
    T, data = cfg.block_size, zlib.crc32(rows)
    if before:
        data = zlib.crc32(before["blocks"][0]["attn"]["wqkv"], data)
    text = text_to_replay(cfg, about, tokenizer)
    old = cfg.batch_size // 4 if len(text) else 0  # rows of it: arXiv 2503.21676
    seen = np.isin(np.arange(cfg.vocab_size), text)  # fixed, or names never asked fall behind
    reference = jax.jit(partial(log_probs, cfg=cfg))

    @jax.jit
    def objective(params, batch, key):
        fixed = jax.lax.stop_gradient(params["wte"])
        wte = jnp.where(seen[:, None], fixed, params["wte"])
        return (dpo_loss if before else gpt.loss)(params | {"wte": wte}, batch, key, cfg)

    def batch_of(some):
        x, y, w = some.reshape(-1, 3, T).swapaxes(0, 1)
        batch = [np.int32(x), np.int32(y), np.float32(w)]
        return [*batch, reference(before, *batch)] if before else batch

    def batch_at(number):
        new = cfg.batch_size - old  # the next so many; main has shuffled them
        batch = batch_of(rows[held:].take(np.arange(new) + number * new, 0, mode="wrap"))
        if old:  # it comes after the answers; a reference, batch[3], has none of it
            replayed = gpt.random_batch(text, old, T, cfg.seed, number)
            batch[:3] = map(np.concatenate, zip(batch, replayed))
        return batch

    def validate(params):
        if not held:
            return "", ""
        parts = np.array_split(rows[:held], held // 32 + 1)  # of two sizes: compiled twice
        sums = [objective(params, batch_of(part), None) for part in parts]
        total, number = np.sum(jax.device_get(sums), 0)
        return float(total / number), ""

    if not cfg.resume:
        about.update(kind="chat", data=data)
        if held:
            say(f"loss of what is held out: {validate(state['params'])[0]:.3f} before")
    if about["data"] != data:
        raise InputError(f"{path}: was begun with other examples; start afresh without --resume")
    return gpt.train(cfg, state, about, objective, batch_at, validate, path)["params"]

def built_in(cfg, name):
    return read_records([*Path(cfg.data_dir).glob(name)])

def answers_to_keep(cfg, about, pairs):
    """Questions whose answers DPO is to leave as they are -> (records to train on, others for the
    test): the user's pairs, or those that the model was fine-tuned on, or the built-in ones."""
    learned = about["config"].get("pairs", ())
    if not pairs and not learned:
        return built_in(cfg, "qa.jsonl"), built_in(cfg, "qa_test.jsonl")[::6]
    pairs = pairs or read_records([name for name in learned if Path(name).exists()])
    pairs = [pairs[i] for i in np.random.default_rng(cfg.seed).permutation(len(pairs))]
    n_test = min(len(pairs) // 10, 100)
    fields = {"set": "yours, not learned now"}
    return pairs[n_test:], [(found, fields, source) for found, _, source in pairs[:n_test]]

def learn_corrections(cfg, about, tokenizer, before, pairs, test):
    """-> (preferences to learn, the corrections among them, a test that ends with those). about:
    that of the model before."""
    keep, others = answers_to_keep(cfg, about, pairs)
    corrections = corrections_in(Path(cfg.out_dir, "feedback.jsonl"), tokenizer, cfg.block_size)
    corrected = {chosen[-2][1] for (chosen, _), *_ in corrections}
    keep = [record for record in keep if record[0][0][0][1] not in corrected]
    records = preferences_of(keep, before, cfg, tokenizer, alone=not corrections)
    if not records:
        say("nothing keeps the other answers as they are, so they will change; to keep them name"
            " questions and answers: python sft.py pairs.jsonl --dpo")
    if corrections:
        records += enough_of(corrections, len(records))
    asked = [([chosen], {"set": "corrected by you"}, "") for (chosen, _), *_ in corrections]
    return records, corrections, (test or others) + asked

def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    dpo, out_dir = cfg.dpo is not None, Path(cfg.out_dir)
    path = out_dir / ("dpo.npz" if dpo else "chat.npz")
    if cfg.resume:
        state, about, _, tokenizer = gpt.load_checkpoint(path, whole=True)
        cfg = gpt.inherit(cfg, given if cfg.dpo else given - {"dpo"}, about, path)
    elif dpo:
        unset = {"max_steps": 200, "learning_rate": 3e-4, "batch_size": 24}
        cfg = replace(cfg, **{name: unset[name] for name in unset.keys() - given})
    # Read now: a pretraining would be in vain.
    pairs, test = read_records(cfg.pairs), read_records(cfg.eval)
    preferences = read_records([cfg.dpo], PREFERENCE) if cfg.dpo else []
    only_test = test and not (pairs or dpo or cfg.resume)
    if not cfg.resume:
        script, name = (main, "chat.npz") if dpo or only_test else (gpt.main, "base.npz")
        start = cfg.init or out_dir / name
        if not given & {"init", "data_dir", "out_dir"}:
            make_if_missing(start, script)
        state, about, _, tokenizer = load_start(start, cfg)
        cfg = gpt.inherit(replace(cfg, init=str(start)), given, about, start)
    gpt.join(cfg)
    gpt.check_device(cfg.dropout)
    if only_test:
        return examine([state["params"]], cfg, tokenizer, test)
    if dpo and Path(cfg.init) == path:
        raise InputError(f"--init {path}: would be overwritten, but DPO compares with it")
    corrections, before = [], None
    if dpo:  # read again: a resumed run has gone on from it
        state_before, about_before, *_ = load_start(cfg.init, cfg)
        before = state_before["params"]
    if dpo and not preferences:
        records, corrections, test = learn_corrections(cfg, about_before, tokenizer, before, pairs,
                                                       test)
    elif dpo:
        records = preferences + preferences_of(pairs, before, cfg, tokenizer, alone=False)
    elif pairs:
        records = pairs
    else:
        records = built_in(cfg, "qa.jsonl")
        test = test or built_in(cfg, "qa_test.jsonl")
    if not records:
        raise InputError(f"no {cfg.data_dir}/qa.jsonl and no correction by /better: name a file of"
                         " questions and answers, python sft.py pairs.jsonl")
    rows = rows_of(records, tokenizer, cfg.block_size)
    if cfg.show:
        return say("\n".join(show(row, tokenizer) for some in rows[:cfg.show] for row in some))
    rows = np.random.default_rng(cfg.seed).permutation(rows)
    # Not trained on, to measure with.
    held = min(len(rows) // 20, 512) if preferences or pairs and not dpo else 0
    say(f"{len(rows)} examples, {held} of them held out, {rows[:, :, 2].sum()} trained tokens")
    params = fine_tune(cfg, state, about, tokenizer, rows, held, path, before)
    if test:
        said = examine([before, params] if dpo else [params], cfg, tokenizer, test)
        for ([chosen, _], *_), answer in zip(corrections, said[-len(corrections):]):
            say(f"{chosen[-2][1]!r}: now {answer!r}")
    say(f"checkpoint: {path}\nnext: python chat.py {path}")

if __name__ == "__main__":
    run(main)

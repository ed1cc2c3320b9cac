"""Supervised fine-tuning: from a model that continues text to one that answers. Then DPO.

    python sft.py                        # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --eval held_out.jsonl
    python sft.py --show 3               # three examples, the trained tokens in colour, then stop
    python sft.py --eval questions.jsonl # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                  # what was corrected in the chat, out/chat.npz -> dpo.npz

Pretraining gave the model its knowledge; here it learns the manner. The loop is that of gpt.py, but
only the tokens of answers have weight. Reading order: records, examples, answers and their marks,
fine-tuning, DPO, main.
"""
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import zlib

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import prepare
from data.world import DONT_KNOW
from prepare import ASSISTANT, END, SPECIAL, USER, InputError, Tokenizer, count, printable
from prepare import list_of, read_flags, report, run, setting, show_progress

# ---------------------------------------------------------------- records: JSON of many shapes

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system", "developer": "system"}
QUESTION = ("system", "prompt", "instruction", "input", "context")  # all there are make it
ANSWER = [("messages", "conversations", "response", "output", "completion")]  # the first there is
PREFERENCE = [("chosen",), ("rejected",)]


def read_json(path, odd):
    """JSON lines or one JSON list -> (record, "file:line")."""
    lines = [(line, source) for line, source in prepare.read_lines(path, odd) if line.strip()]
    is_list = bool(lines) and lines[0][0].lstrip().startswith("[")
    if is_list:
        lines = [("".join(line for line, _ in lines), path)]
    for text, source in lines:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            count(odd, "part(s) that are not JSON", source)
            continue
        if is_list:
            yield from ((record, f"{path}: record {i}") for i, record in enumerate(found, 1))
        else:
            yield found, source


def turns_of(record, names):
    """A record of any shape -> its turns as dicts. names: what its answer, or the whole
    conversation, may be called. A text that is an answer follows the question."""
    turns = next((record[name] for name in names if name in record), None)
    asked = [record[name] for name in QUESTION if record.get(name)]
    if asked and not isinstance(asked[0], list):
        asked = [[{"role": "user", "content": "\n\n".join(asked)}]]
    if isinstance(turns, str):
        turns = [{"role": "assistant", "content": turns}]
    if asked and turns[0].get("role") == "assistant":
        turns = asked[0] + turns
    return turns


def messages_of(turns):
    """OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"}, ...] -> [(role, text,
    trained), ...] going user, assistant, user, assistant. A system text goes before the first
    question; an answer of "weight" 0 is not trained."""
    messages, system = [], ""
    for turn in turns:
        role = ROLES.get(turn.get("role", turn.get("from")), "other")
        text = turn.get("content", turn.get("value"))
        if isinstance(text, list):
            text = "".join(part["text"] for part in text)
        text = "\n\n".join(part for part in (system, text) if part != "")
        system = ""
        if role == "system" and not messages:
            system = text
            continue
        if role != ("user", "assistant")[len(messages) % 2] or turn.get("tool_calls"):
            raise ValueError("whose turns are not user, assistant, user, assistant")
        if role == "assistant" and not text.strip():
            raise ValueError("with an empty answer")
        messages.append((role, text, role == "assistant" and turn.get("weight", 1) != 0))
    return messages


def conversations(path, odd, kind=ANSWER):
    """A file -> (messages for each answer, record, "file:line"). What cannot be a conversation is
    left out and counted in odd. What both answers of a preference share is not trained."""
    for record, source in read_json(path, odd):
        try:
            found = [messages_of(turns_of(record, names)) for names in kind]
            if found[0][-1][0] == "user":
                count(odd, "last question(s) without an answer", source)
                found = [messages[:-1] for messages in found]
            if len(found) == 2:
                same = [a == b for a, b in zip(*found)]
                shared = (same + [False]).index(False)  # so many messages at the beginning
                found = [[(*m[:2], m[2] and i >= shared) for i, m in enumerate(messages)]
                         for messages in found]
            if not all(any(trained for *_, trained in messages) for messages in found):
                raise ValueError("without an answer to train")
            yield found, record, source
        except ValueError as e:
            count(odd, f"record(s) {e}", source)
        except (AttributeError, IndexError, KeyError, TypeError):  # anything can be in a JSON file
            count(odd, "record(s) of no known shape", source)


def read_records(paths, kind=ANSWER):
    """Files -> [(messages for each answer, record, "file:line")]; one line tells what is not
    among them."""
    odd, found = {}, []
    for path in paths:
        found += conversations(path, odd, kind)
    if paths and not found:
        raise InputError(f"{path}: no question with an answer in it; left out: {list_of(odd)}")
    report(odd)
    return found


# ---------------------------------------------------------------- examples


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


def examples_of(records, tokenizer, T):
    """Records -> examples, [(ids, which of them are trained), ...] with one for each answer, of
    those that fit the context."""
    odd, examples = {}, []
    for found, _, source in records:
        rendered = [render(messages, tokenizer) for messages in found]
        if max(len(ids) for ids, _ in rendered) > T:
            count(odd, f"record(s) longer than the context of {T} tokens", source)
        else:
            examples.append([(np.array(ids, "<u2"), np.array(mask)) for ids, mask in rendered])
    if not examples:
        raise InputError(f"no example fits the context of {T} tokens ({len(records)} do not); a"
                         " base needs a larger --block_size")
    report(odd)
    return examples


def show(example, trained, tokenizer):
    """The example as text; what is trained stands out."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    text = ""
    for (marked, special), part in itertools.groupby(zip(example, trained), lambda pair: (
            pair[1], pair[0] < len(SPECIAL))):
        ids = [id for id, _ in part]  # decoded together: a character may be several tokens
        words = "".join(SPECIAL[id] for id in ids) if special else printable(tokenizer.decode(ids))
        text += f"{on}{words}{off}" if marked else words
    return text.replace(off + on, "")


def shift(ids, trained, T):
    """shift([5, 6, 7], [False, False, True], 4) -> x [5, 6, 0, 0], y [6, 7, 0, 0], w [0, 1, 0, 0]:
    w is 1 where the *target* y is trained."""
    row = np.zeros((3, T), np.int32)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row


def epoch_order(total, n, seed, number):
    """Which n of `total` examples make the number-th batch: in an epoch each comes once, in an
    order of its own."""
    first, start = divmod(number * n, total)
    epochs = range(first, first + (start + n - 1) // total + 1)
    order = [np.random.default_rng([seed, epoch]).permutation(total) for epoch in epochs]
    return np.concatenate(order)[start:start + n]


# ---------------------------------------------------------------- answers and their marks


def answer_all(params, cfg, tokenizer, prompts, longest, temperature=0.0):
    """Answers to prompts (lists of ids), 64 at a time -> [text]."""
    generate, rng, answers = gpt.make_generator(cfg), np.random.default_rng(cfg.seed), []

    def choose(row, logits, history):
        return gpt.sample(logits, history, rng, temperature)

    for start in range(0, len(prompts), 64):
        some = prompts[start:start + 64]
        padding = [[END]] * (64 - len(some))  # batches of one size: compiled once
        steps = list(generate(params, some + padding, choose, longest))
        for i in range(len(some)):
            ids = [step[i] for step in steps if step[i] is not None]
            answers.append(tokenizer.decode(ids).removeprefix(" "))
        show_progress(f"answering: {len(answers)} of {len(prompts)}",
                      last=len(answers) == len(prompts))
    return answers


def grade(params, cfg, tokenizer, test, column):
    """Answer the test's questions greedily; record[column] becomes "right" (the whole answer, word
    for word), "declined" or "wrong". A record may ask to "complete" a text instead."""
    prompts, longest = [], 0
    for [messages], record, _ in test:
        prompt, _ = render(messages[:-1], tokenizer)
        if "complete" in record:
            prompt = [END, *tokenizer.encode(messages[0][1])]
        prompts.append(prompt)
        longest = max(longest, len(tokenizer.encode(messages[-1][1])) + 8)
    said = answer_all(params, cfg, tokenizer, prompts, longest)
    for ([messages], record, _), answer in zip(test, said):
        expected, record["said"] = messages[-1][1].strip(), answer
        right = answer.startswith(expected) if "complete" in record else answer == expected
        record[column] = "declined" if answer == DONT_KNOW else "right" if right else "wrong"


def table(test, columns):
    """Print for each set of questions how many % of the answers were right, declined, wrong."""
    print(f"{'set':<24}{'questions':>10}{'right':>18}{'declined':>18}{'wrong':>18}")
    sets = {}
    for _, record, _ in test:
        sets.setdefault(printable(str(record.get("set", "all"))), []).append(record)
    for name, records in sets.items():
        cells = ""
        for verdict in ("right", "declined", "wrong"):
            parts = [100 * np.mean([r[column] == verdict for r in records]) for column in columns]
            cells += f"{' -> '.join(f'{part:.1f}' for part in parts):>18}"
        print(f"{name:<24}{len(records):>10}{cells}")


# ---------------------------------------------------------------- fine-tuning and DPO


def batch_of(examples, T):
    """Examples of n answers each -> x, y, w (number of examples, n, T)."""
    rows = [[shift(*answer, T) for answer in example] for example in examples]
    x, y, w = np.array(rows).transpose(2, 0, 1, 3)
    return x, y, np.float32(w)


def sft_loss(params, batch, key, cfg):
    """The loss of gpt.py for examples of one answer: x, y, w (n, 1, T)."""
    return gpt.loss(params, [a.reshape(-1, cfg.block_size) for a in batch], key, cfg)


def log_probs(params, x, y, w, cfg):
    """Log-probability of what is trained in each answer: x, y, w (n, 2, T) -> (n, 2)."""
    T = x.shape[-1]
    losses = gpt.token_losses(params, x.reshape(-1, T), y.reshape(-1, T), cfg)
    return -(losses.reshape(w.shape) * w).sum(-1)


def dpo_loss(params, batch, key, cfg, anchor=1.0):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) -> (sum, count). batch: x, y, w
    (n, 2, T), the chosen answer first, and the log-probabilities (n, 2) that the model before
    training, the reference, gave them.

    `anchor` times the loss per token of the chosen answer is added: its probability would otherwise
    fall along with that of the rejected one (arXiv 2404.19733)."""
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


def in_parts(total, size=32):
    """The numbers below total in parts of about `size`, of two sizes at most: compiled twice."""
    return np.array_split(np.arange(total), total // size + 1)


def log_probs_of(examples, params, cfg):
    """log_probs of all examples (N, 2)."""
    compute = jax.jit(functools.partial(log_probs, cfg=cfg))
    return np.concatenate([
        compute(params, *batch_of([examples[i] for i in part], cfg.block_size))
        for part in in_parts(len(examples))])


def corrections_in(path):
    """What people corrected in the chat, of each question the last, as records."""
    last = {}
    for record in read_records([path], PREFERENCE) if path.exists() else []:
        last[tuple(record[0][0][:-1])] = record
    return list(last.values())


def built_in_preferences(cfg, params, tokenizer, n=2000):
    """Records of the built-in questions: where the answer is known it is chosen and "I do not know
    that." rejected; where it is not, that is chosen and rejected what the model makes up or, if it
    makes up nothing, the answer to another question."""
    path = pathlib.Path(cfg.data_dir, "qa.jsonl")
    if not path.exists():  # the model is of somebody's own text
        return []
    found = [m for [m], *_ in conversations(path, {}) if len(m) == 2]
    some = [found[i] for i in np.random.default_rng(cfg.seed).permutation(len(found))[:n]]
    known = [m for m in some if m[1][1] != DONT_KNOW]
    unknown = [m for m in some if m[1][1] == DONT_KNOW]
    prompts = [render(messages[:1], tokenizer)[0] for messages in unknown]
    said = answer_all(params, cfg, tokenizer, prompts, cfg.block_size // 2, temperature=1.2)
    others = itertools.cycle(answer for _, (_, answer, _) in known)
    invented = [next(others) if text.strip() in ("", DONT_KNOW) else text for text in said]
    pairs = zip(known + unknown, [DONT_KNOW] * len(known) + invented)
    return [([[question, answer], [question, ("assistant", text, True)]], {}, "")
            for (question, answer), text in pairs]


# ---------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Config(gpt.Config):
    pairs: str = setting((), "questions and answers, JSON or JSON lines; nothing: the built-in"
                         " ones", nargs="*", positional="pairs", metavar="PAIRS")
    init: str = setting("", "checkpoint to start from; nothing: base.npz in out_dir, for DPO"
                        " chat.npz")
    eval: str = setting("", "questions to test with; without PAIRS nothing is trained")
    show: int = setting(0, "print this many examples with what is trained, and stop")
    replay: float = setting(0.25, "part of the rows that is pretraining text", high=0.9)
    dpo: str = setting(None, "preferences to train on; without a file: the corrections made in the"
                       " chat, and built-in ones", nargs="?", const="")
    beta: float = setting(0.1, "DPO: how far the model may move from what it was")
    batch_size: int = setting(48, "rows in a micro-batch", low=1)
    max_steps: int = setting(1200, "optimiser steps [with --dpo: 150]", low=1)
    learning_rate: float = setting(2e-3, "at its peak; then along a cosine to 5 % [--dpo: 2e-4]")


def make_if_missing(path, script, flags=()):
    """Run the main of the script that makes a default input, unless it is there and finished."""
    name = pathlib.Path(script.__code__.co_filename).name
    if not path.exists():
        print(f"no {path} yet: running {name}")
        return script(list(flags))
    _, about, cfg, _ = gpt.load_checkpoint(path)
    if about["step"] < cfg.max_steps:
        print(f"{path} is unfinished: going on with {name}")
        script([*flags, "--resume"])


def read_replay(cfg, tokenizer):
    """Pretraining text to mix in, against forgetting (arXiv 2503.21676), and a validation on it."""
    data_dir = pathlib.Path(cfg.data_dir)
    source = data_dir / "tokenizer.json"
    if source.exists() and Tokenizer.load(source).merges == tokenizer.merges:
        val = gpt.load_tokens(data_dir / "val.bin", tokenizer, 2)
        ids = gpt.load_tokens(data_dir / "train.bin", tokenizer, cfg.block_size + 1)
        return ids, gpt.make_validation(val, tokenizer, cfg)
    print(f"{data_dir} is not the text of {cfg.init}, so none of it is replayed")
    return None, lambda params: ("", "")


def fine_tune(cfg, state, about, tokenizer, examples, held, path):
    """Train on all examples but the first `held`, by imitation if they have one answer, by DPO if
    they have two -> the parameters after it."""
    T, dpo, old = cfg.block_size, len(examples[0]) == 2, 0
    objective = jax.jit(functools.partial(dpo_loss if dpo else sft_loss, cfg=cfg))
    if dpo:
        before = gpt.load_checkpoint(cfg.init)[0]["params"]
        reference = log_probs_of(examples, before, cfg)
    replay, validate = read_replay(cfg, tokenizer)
    if replay is not None:
        old = round(cfg.batch_size * cfg.replay)

    def batch_from(some):
        batch = batch_of([examples[i] for i in some], T)
        return (*batch, reference[some]) if dpo else batch

    def batch_at(number):
        order = epoch_order(len(examples) - held, cfg.batch_size - old, cfg.seed, number)
        batch = batch_from(held + order)
        if old:
            replayed = gpt.random_batch(replay, old, T, cfg.seed, number)
            if dpo:
                return [*batch, *replayed]
            batch = [np.concatenate([a, b[:, None]]) for a, b in zip(batch, replayed)]
        return batch

    def held_out_loss(params):
        sums = [objective(params, batch_from(part), None) for part in in_parts(held)]
        total, number = np.sum(jax.device_get(sums), axis=0)
        return float(total / number)

    data = zlib.crc32(b"".join(ids.tobytes() for example in examples for ids, _ in example))
    if cfg.resume and about["data"] != data:
        raise InputError(f"{path}: was begun with other examples; start afresh without --resume")
    if not cfg.resume:
        params = state["params"]
        base = about.get("base", zlib.crc32(params["wte"]))
        if about["kind"] == "base":  # the roles' ids were reserved, never seen: begin amid others
            noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, cfg.n_embd))
            params["wte"][[USER, ASSISTANT]] = params["wte"].mean(0) + noise
        about = {"kind": "chat", "tokenizer": about["tokenizer"], "step": 0, "seconds": 0.0,
                 "log": [], "data": data, "base": base}
        if held:
            about["before"] = held_out_loss(params)
        state = gpt.new_state(params)
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path)
    if held:
        print(f"loss of what was held out: {about['before']:.3f} ->"
              f" {held_out_loss(state['params']):.3f}")
    return state["params"]


def start_of(cfg, given, from_chat):
    """The checkpoint to begin with; a default one that is missing is made."""
    if cfg.init:
        return cfg.init
    start, script = pathlib.Path(cfg.out_dir, "base.npz"), gpt.main
    if from_chat:
        start, script = pathlib.Path(cfg.out_dir, "chat.npz"), main
    flags = [f"--{n}={getattr(cfg, n)}" for n in ("data_dir", "out_dir", "seed") if n in given]
    make_if_missing(start, script, flags)
    return str(start)


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    dpo, out_dir = cfg.dpo is not None, pathlib.Path(cfg.out_dir)
    path, kind = out_dir / ("dpo.npz" if dpo else "chat.npz"), PREFERENCE if dpo else ANSWER
    if dpo and cfg.pairs:
        raise InputError(f"{cfg.pairs[0]}: preferences go behind --dpo; PAIRS are for fine-tuning")
    if cfg.resume:
        state, about, _, tokenizer = gpt.load_checkpoint(path, whole=True)
        cfg = gpt.inherit(cfg, given if cfg.dpo else given - {"dpo"}, about, path)
    elif dpo:
        unset = {"max_steps": 150, "learning_rate": 2e-4, "batch_size": 32}
        cfg = dataclasses.replace(cfg, **{k: v for k, v in unset.items() if k not in given})
    own = cfg.pairs or [cfg.dpo] if cfg.pairs or cfg.dpo else []
    # What is wrong with these is told now, not after a pretraining.
    records, test = read_records(own, kind), read_records([cfg.eval] if cfg.eval else [])
    if not cfg.resume:
        start = start_of(cfg, given, dpo or test and not own)
        state, about, _, tokenizer = gpt.load_checkpoint(start)
        cfg = gpt.inherit(dataclasses.replace(cfg, init=start), given, about, start)
    gpt.join(cfg)
    gpt.check_device()
    if dpo and cfg.init == str(path):
        raise InputError(f"--init {path}: would be overwritten, but DPO compares with it")
    if test and not (own or dpo or cfg.resume):
        grade(state["params"], cfg, tokenizer, test, "now")
        return table(test, ["now"])
    corrections = []
    if not own:
        questions = pathlib.Path(cfg.data_dir, "qa_test.jsonl")
        if questions.exists() and not test:
            test = read_records([questions])
        if dpo:
            test, corrections = test[::6], corrections_in(out_dir / "feedback.jsonl")
            before = gpt.load_checkpoint(cfg.init)[0]["params"]
            records = built_in_preferences(cfg, before, tokenizer)
            records += corrections * (1 + len(records) // (2 * len(corrections) + 1))
            stale = {rejected[-1][1] for (_, rejected), *_ in corrections} - {DONT_KNOW}
            test = [t for t in test if t[0][0][-1][1] not in stale]
        else:
            records = read_records([f"{cfg.data_dir}/qa.jsonl"])
    test += [([chosen], {"set": "corrected by you"}, "") for (chosen, _), *_ in corrections]
    examples = examples_of(records, tokenizer, cfg.block_size)
    if cfg.show:
        return print("\n".join(show(*a, tokenizer) for e in examples[:cfg.show] for a in e))
    held = len(examples) // 20 if own or dpo else 0  # not trained on, to measure with
    tokens = sum(trained.sum() for example in examples for _, trained in example)
    print(f"{len(examples)} examples, {held} of them held out, {tokens} trained tokens")
    columns = ["before", "after"] if dpo and not cfg.resume else ["after"]
    if "before" in columns and test:
        grade(state["params"], cfg, tokenizer, test, "before")
    params = fine_tune(cfg, state, about, tokenizer, examples, held, path)
    if test:
        grade(params, cfg, tokenizer, test, "after")
        table(test, columns)
    for [messages], record, _ in test[len(test) - len(corrections):]:
        print(f"{messages[-2][1]!r}: now {record['said']!r}")
    print(f"checkpoint: {path}\nnext: python chat.py {path}")


if __name__ == "__main__":
    run(main)

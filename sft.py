"""Supervised fine-tuning: from a model that continues text to one that answers.

    python sft.py                             # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --init out/base.npz --eval held_out.jsonl
    python sft.py --show 3                    # three examples, the trained tokens in colour, then stop
    python sft.py --eval questions.jsonl      # no training: how many answers of out/chat.npz are right

Pretraining gave the model its knowledge; here it learns the manner. The step is that of gpt.py, but only the tokens
of answers have weight. Reading order: reading files, rendering, batches, evaluation, main.
"""
import dataclasses
import functools
import json
import pathlib
import sys
from collections import Counter, defaultdict

import gpt
import numpy as np
import prepare
from prepare import ASSISTANT, END, USER, InputError, read_flags, run, setting, show_progress

# ---------------------------------------------------------------- reading files


def read_records(path):
    """A JSON list or JSON lines, also .gz -> [(record, "file:line")]."""
    with prepare.open_bytes(path) as file:
        text = prepare.to_text(file.read(), path)
    if not text.strip():
        raise InputError(f"{path}: empty; give it questions and answers")
    try:
        if text.lstrip().startswith("["):
            return [(record, f"{path}: record {i}") for i, record in enumerate(json.loads(text), 1)]
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                records.append((json.loads(line), f"{path}:{number}"))
        return records
    except (ValueError, RecursionError) as e:
        number = getattr(e, "lineno", 1) if text.lstrip().startswith("[") else number
        raise InputError(f"{path}:{number}: not JSON ({e})") from None


def turns_of(record, source):
    """One record -> [question, answer, question, answer, ...]; raises InputError naming the line.

    {"instruction", "response"}, Alpaca's {"instruction", "input", "output"}, Dolly's {"instruction", "context",
    "response"}, or {"messages": [{"role", "content"}, ...]} whose system turn goes before the first question."""
    if not isinstance(record, dict):
        raise InputError(f"{source}: not an object with \"instruction\" and \"response\", or \"messages\"")
    if "messages" in record:
        messages = record["messages"]
        whole = lambda m: isinstance(m, dict) and isinstance(m.get("content"), str)
        if not isinstance(messages, list) or not all(map(whole, messages)):
            raise InputError(f'{source}: "messages" must be a list of {{"role", "content"}}')
        system = messages[0]["content"] + "\n\n" if messages and messages[0].get("role") == "system" else ""
        messages = messages[bool(system):]
        turns = [m["content"] for m in messages]
        roles = [m.get("role") for m in messages]
        if not turns or len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
            raise InputError(f"{source}: roles must go user, assistant, user, assistant, ...; found {roles}")
        turns[0] = system + turns[0]
    else:
        question, more = record.get("instruction"), record.get("input", record.get("context")) or ""
        answer = record.get("response", record.get("output"))
        if not all(isinstance(s, str) for s in (question, more, answer)):
            raise InputError(f'{source}: needs "instruction" and "response" (or "output"), both text')
        turns = [f"{question}\n\n{more}" if more else question, answer]
    if not all(t.strip() for t in turns[1::2]):
        raise InputError(f"{source}: an empty answer; there is nothing to learn from it")
    return turns


# ---------------------------------------------------------------- rendering


def render(turns, tokenizer):
    """[question, answer, ...] -> (ids, which of them are trained): <|user|> question <|assistant|> answer <|end|> ...

    Put together from ids, so no text can forge a special token. A turn is encoded with a space before it: its first
    word is then the same token as within a text. An odd number of turns ends in <|assistant|>: the prompt of chat.py.
    """
    ids, trained = [], []
    for i, text in enumerate(turns):
        words = tokenizer.encode(f" {text}")
        if i % 2 == 0:
            ids += [USER, *words, ASSISTANT]
            trained += [False] * (len(words) + 2)
        else:
            ids += [*words, END]
            trained += [True] * (len(words) + 1)
    return ids, trained


def shift(ids, trained, T):
    """Ids and mask -> one row x, y, w of length T; w is 1 where the *target* y is trained, else (and in padding) 0."""
    row = np.zeros((3, T), np.int32)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row


def show(ids, trained, tokenizer):
    """The example as text; what is trained stands out."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    names = dict(enumerate(prepare.SPECIAL))
    out, before = "", False
    for i, t in zip(ids, trained):
        out += (on if t else off) * (t != before) + (names.get(i) or prepare.printable(tokenizer.decode([i])))
        before = t
    return out + off * before


# ---------------------------------------------------------------- batches


def mixed_batch(rows, replay_ids, n, replay, T, seed, number):
    """The number-th batch: n rows, a part `replay` of them pretraining text with full weight, against forgetting
    (arXiv 2503.21676); the rest examples, each once in an epoch. A function of (seed, number)."""
    old = round(n * replay) if replay_ids is not None else 0
    new = n - old
    position = np.arange(number * new, (number + 1) * new)
    epochs = np.unique(position // len(rows)).tolist()
    orders = {e: np.random.default_rng([seed, e]).permutation(len(rows)) for e in epochs}
    x, y, w = np.stack([rows[orders[p // len(rows)][p % len(rows)]] for p in position.tolist()], axis=1)
    if old:
        replayed = gpt.random_batch(replay_ids, old, T, seed, number)
        x, y, w = (np.concatenate(pair) for pair in zip((x, y, w), replayed))
    return x, y, w.astype(np.float32)


# ---------------------------------------------------------------- evaluation


def answer_all(params, model, tokenizer, prompts, max_new_tokens):
    """Greedy answers to prompts (lists of ids) -> [(text, whether it ended by itself)], in batches of a fixed size."""
    generate, n, answers = gpt.make_generator(model), 64, []
    for start in range(0, len(prompts), n):
        some = prompts[start:start + n]
        likeliest = lambda i, logits, history: int(logits.argmax())
        steps = list(generate(params, some + [[END]] * (n - len(some)), likeliest, max_new_tokens))
        for i in range(len(some)):
            ids = [step[i] for step in steps if step[i] is not None]
            answers.append((tokenizer.decode(ids).removeprefix(" "), END in ids))
        show_progress(f"answering: {len(answers)} of {len(prompts)}", last=len(answers) == len(prompts))
    return answers


def grade(params, model, tokenizer, records):
    """-> for each record whether the greedy answer is the right one, whole; and the part of answers that ended."""
    prompts = [[END, *tokenizer.encode(r["prompt"])] if "prompt" in r else render(r["turns"][:-1], tokenizer)[0]
               for r in records]
    longest = max(len(tokenizer.encode(r["response"])) for r in records) + 8
    answers = answer_all(params, model, tokenizer, prompts, longest)
    right = [text.startswith(r["response"].strip()) if "prompt" in r else text == r["response"]
             for r, (text, _) in zip(records, answers)]
    ended = [end for r, (_, end) in zip(records, answers) if "prompt" not in r]
    return right, sum(ended) / max(1, len(ended))


def table(records, columns, by):
    """Print the percentage of right answers a group. columns: {name: list of bool}. The best constant guess always
    says the most frequent value of an attribute."""
    groups = defaultdict(list)
    for i, r in enumerate(records):
        groups[r.get(by, "all")].append(i)
    print(f"{by:<24}{'questions':>10}" + "".join(f"{name:>20}" for name in columns) + f"{'best constant guess':>22}")
    for name, members in groups.items():
        values = defaultdict(Counter)
        for i in members:
            values[records[i].get("attribute")][records[i].get("value", records[i]["response"])] += 1
        guess = sum(max(c.values()) for c in values.values()) / len(members)
        percent = [f"{100 * sum(right[i] for i in members) / len(members):>20.1f}" for right in columns.values()]
        print(f"{name:<24}{len(members):>10}{''.join(percent)}{100 * guess:>22.1f}")


def read_test(path):
    """Test questions: pairs as above, or {"prompt", "response"} for a text to continue."""
    records = []
    for record, source in read_records(path):
        if isinstance(record, dict) and "prompt" in record and isinstance(record.get("response"), str):
            records.append(record)
        else:
            turns = turns_of(record, source)
            records.append(dict(record, turns=turns, response=turns[-1]))
    return records


# ---------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Config(gpt.Training):
    pairs: str = setting((), "questions and answers, JSON or JSON lines; nothing: the built-in ones", nargs="*",
                         positional="pairs", metavar="PAIRS")
    init: str = setting("", "checkpoint to start from; nothing: base.npz in out_dir", metavar="CKPT")
    eval: str = setting("", "questions and answers to test with; without PAIRS nothing is trained", metavar="PAIRS")
    show: int = setting(0, "print this many examples with what is trained, and stop", low=0)
    replay: float = setting(0.25, "part of the rows that is pretraining text", low=0.0, high=0.9)
    batch_size: int = setting(32, "rows in a micro-batch", low=1, high=1 << 20)
    max_steps: int = setting(600, "optimiser steps", low=1)
    learning_rate: float = setting(2e-3, "at its peak, after warm-up; falls along a cosine to 5 % of it", low=0.0)


def read_examples(paths, tokenizer, T):
    """Files of pairs -> the rendered examples that fit the context; says how many do not."""
    examples = [render(turns_of(*record), tokenizer) for path in paths for record in read_records(path)]
    fitting = [(ids, trained) for ids, trained in examples if len(ids) <= T]
    if len(fitting) < len(examples):
        print(f"left out: {len(examples) - len(fitting)} of {len(examples)} examples, longer than {T} tokens, the context")
    if not fitting:
        raise InputError(f"{paths[0]}: no example fits the context of {T} tokens; train a base with a larger --block_size")
    return fitting


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    gpt.check_device()
    out_dir, data_dir = pathlib.Path(cfg.out_dir), pathlib.Path(cfg.data_dir)
    path, log_path, base = out_dir / "chat.npz", out_dir / "log_sft.csv", pathlib.Path(cfg.init or out_dir / "base.npz")
    only_test = bool(cfg.eval) and not cfg.pairs and path.exists() and not cfg.init
    if not (cfg.init or only_test) and (not base.exists() or gpt.unfinished(base)):
        print(f"{base} is unfinished (--init takes it as it is): going on with gpt.py" if base.exists() else
              f"no {base} yet: running gpt.py")
        flags = [f"--{name}={getattr(cfg, name)}" for name in ("data_dir", "out_dir", "seed") if name in given]
        gpt.main(flags + ["--resume"] * base.exists())
    state, about, model, tokenizer = gpt.load_checkpoint(path if cfg.resume or only_test else base)
    if cfg.resume:
        cfg = gpt.resume_config(cfg, given, about["config"], path)
    test = read_test(cfg.eval) if cfg.eval else [] if cfg.pairs else read_test(data_dir / "qa_test.jsonl")
    if only_test:
        return table(test, {path.name: grade(state["params"], model, tokenizer, test)[0]}, "set")
    T = model.block_size
    examples = read_examples(cfg.pairs or [data_dir / "qa.jsonl"], tokenizer, T)
    if cfg.show:
        return print("\n".join(show(*example, tokenizer) for example in examples[:cfg.show]))
    rows = np.stack([shift(*example, T) for example in examples])
    replay, validate, source = None, None, data_dir / "tokenizer.json"
    if source.exists() and source.read_text(encoding="utf-8") == tokenizer.to_json():
        replay, val = (gpt.load_tokens(data_dir, name, tokenizer, T) for name in ("train.bin", "val.bin"))
        validate = gpt.make_validation(val, tokenizer, model, cfg, gpt.placements(cfg.batch_size)[1])
    else:
        print(f"{data_dir} is not the text that {base} was trained on, so none of it is replayed")
    columns = {}
    if not cfg.resume:
        if test:
            columns["before"] = grade(state["params"], model, tokenizer, test)[0]
        state = gpt.new_state(state["params"])
        if about["kind"] == "base":  # the roles' ids were reserved but never seen: start them amid the others
            noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, model.n_embd))
            state["params"]["wte"][[USER, ASSISTANT]] = state["params"]["wte"].mean(0) + noise
        about = dict(about, kind="chat", step=0, seconds=0.0)
        gpt.keep_previous(path, log_path)
    print(f"{len(rows)} examples, {rows[:, 2].sum()} trained tokens,"
          f" {len(rows) / (cfg.batch_size * (1 - cfg.replay)):.0f} steps an epoch")
    batch_at = functools.partial(mixed_batch, rows, replay, cfg.batch_size, cfg.replay, T, cfg.seed)
    objective = functools.partial(gpt.loss, model=model)
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path, log_path, lambda params: None)
    if test:
        columns["after"], ended = grade(state["params"], model, tokenizer, test)
        table(test, columns, "set")
        print(f"{100 * ended:.1f} % of the answers end by themselves")
        hard = [i for i, record in enumerate(test) if record.get("set") == "B, new wording"]
        if hard:
            print("\nB, new wording:")
            table([test[i] for i in hard], {"after": [columns["after"][i] for i in hard]}, "attribute")
    print(f"checkpoint: {path}\nnext: python chat.py")


if __name__ == "__main__":
    run(main)

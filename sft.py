"""Supervised fine-tuning: from a model that continues text to one that answers. And DPO, the level after that.

    python sft.py                             # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --init out/base.npz --eval held_out.jsonl
    python sft.py --show 3                    # three examples, the trained tokens in colour, then stop
    python sft.py --eval questions.jsonl      # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                       # right answers against its own rambling, out/chat.npz -> out/dpo.npz

Pretraining gave the model its knowledge; here it learns the manner. The step is that of gpt.py, but only the tokens
of answers have weight. Reading order: reading files, rendering, batches, evaluation, preferences (DPO), main.
"""
import dataclasses
import functools
import json
import pathlib
import sys
from collections import Counter, defaultdict

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import prepare
from prepare import ASSISTANT, END, USER, InputError, Tokenizer, read_flags, run, setting, show_progress

# ---------------------------------------------------------------- reading files


def read_records(path):
    """A JSON list or JSON lines, also .gz -> [(record, "file:line")]."""
    lines = list(prepare.read_lines(path))
    text = "".join(line for line, _ in lines)
    records = []
    try:
        if text.lstrip().startswith("["):
            source = path
            records = [(record, f"{path}: record {i}") for i, record in enumerate(json.loads(text), 1)]
        else:
            for line, source in lines:
                if line.strip():
                    records.append((json.loads(line), source))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{source}: not JSON ({e})") from None
    if not records:
        raise InputError(f"{path}: empty; give it questions and answers")
    return records


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


def epoch_order(count, n, seed, number):
    """Which n of count examples make the number-th batch: each is seen once in an epoch, in an order of its own."""
    places = range(number * n, (number + 1) * n)
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in {p // count for p in places}}
    return np.array([orders[p // count][p % count] for p in places])


def mixed_batch(rows, replay_ids, n, replay, T, seed, number):
    """The number-th batch: n rows, a part `replay` of them pretraining text with full weight, against forgetting
    (arXiv 2503.21676); the rest examples. A function of (seed, number)."""
    old = round(n * replay) if replay_ids is not None else 0
    x, y, w = rows[epoch_order(len(rows), n - old, seed, number)].swapaxes(0, 1)
    if old:
        replayed = gpt.random_batch(replay_ids, old, T, seed, number)
        x, y, w = (np.concatenate(pair) for pair in zip((x, y, w), replayed))
    return x, y, w.astype(np.float32)


# ---------------------------------------------------------------- evaluation


def likeliest(i, logits, history):
    return int(logits.argmax())


def answer_all(params, model, tokenizer, prompts, max_new_tokens, choose=likeliest):
    """Answers to prompts (lists of ids) -> [(text, number of tokens with <|end|>, whether it ended by itself)]."""
    generate, n, answers = gpt.make_generator(model), 64, []  # batches of a fixed size: compiled once
    for start in range(0, len(prompts), n):
        some = prompts[start:start + n]
        steps = list(generate(params, some + [[END]] * (n - len(some)), choose, max_new_tokens))
        for i in range(len(some)):
            ids = [step[i] for step in steps if step[i] is not None]
            answers.append((tokenizer.decode(ids).removeprefix(" "), len(ids), END in ids))
        show_progress(f"answering: {len(answers)} of {len(prompts)}", last=len(answers) == len(prompts))
    return answers


def grade(params, model, tokenizer, records):
    """-> for each record whether the greedy answer is the right one, whole; and the part of answers that ended."""
    prompts = [[END, *tokenizer.encode(r["prompt"])] if "prompt" in r else render(r["turns"][:-1], tokenizer)[0]
               for r in records]
    longest = max(len(tokenizer.encode(r["response"])) for r in records) + 8
    answers = answer_all(params, model, tokenizer, prompts, longest)
    right = [text.startswith(r["response"].strip()) if "prompt" in r else text == r["response"]
             for r, (text, *_) in zip(records, answers)]
    ended = [end for r, (*_, end) in zip(records, answers) if "prompt" not in r]
    return right, sum(ended) / max(1, len(ended))


def log_probs(params, x, y, w, model):
    """Log-probability of what is trained in each row: x, y, w (n, T) -> (n,)."""
    losses = jax.vmap(functools.partial(gpt.token_losses, key=None, model=model), (None, 0, 0))(params, x, y)
    return -(losses * w).sum(-1)


compiled_log_probs = jax.jit(log_probs, static_argnames="model")


def log_probs_of(params, rows, model, n=32):
    """The same for any number of rows (..., 3, T) -> (...), in batches of a fixed size."""
    flat = rows.reshape(-1, *rows.shape[-2:])
    whole = np.resize(flat, (-(-len(flat) // n) * n, *flat.shape[1:]))
    batches = [whole[i:i + n].swapaxes(0, 1) for i in range(0, len(whole), n)]
    parts = [np.asarray(compiled_log_probs(params, *batch, model=model)) for batch in batches]
    return np.concatenate(parts)[:len(flat)].reshape(rows.shape[:-2])


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
        print(f"{prepare.printable(str(name)):<24}{len(members):>10}{''.join(percent)}{100 * guess:>22.1f}")


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


# ---------------------------------------------------------------- preferences (DPO)

BOLD = 1.2  # temperature at which the model is sampled, so that it does not always say the same


def read_preferences(path):
    """{"instruction", "chosen", "rejected"} a line -> [(question, chosen, rejected)]"""
    preferences = []
    for record, source in read_records(path):
        texts = [isinstance(record, dict) and record.get(k) for k in ("instruction", "chosen", "rejected")]
        if not all(isinstance(text, str) and text.strip() for text in texts) or texts[1] == texts[2]:
            raise InputError(f'{source}: needs "instruction" and two different texts, "chosen" and "rejected"')
        preferences.append(texts)
    return preferences


def own_preferences(params, model, tokenizer, path, seed, n=1000):
    """The right answers of `path` against the model's own rambling: what it says when it must go on."""
    pairs = {r["instruction"]: r["response"] for r, _ in read_records(path) if "instruction" in r}
    questions = np.random.default_rng(seed).permutation(sorted(pairs))[:n].tolist()
    said = bold_answers(params, model, tokenizer, questions, seed, may_end=False)
    return [(q, pairs[q], text) for q, (text, *_) in zip(questions, said) if text.strip() and text != pairs[q]]


def bold_answers(params, model, tokenizer, questions, seed, may_end=True):
    """Sampled answers: [(text, number of tokens, whether it ended by itself)]."""
    rng, never = np.random.default_rng(seed), np.zeros(model.vocab_size)
    never[END] = 0 if may_end else -np.inf
    choose = lambda i, logits, history: gpt.sample(logits + never, history, rng, temperature=BOLD)
    prompts = [render([q], tokenizer)[0] for q in questions]
    return answer_all(params, model, tokenizer, prompts, model.block_size // 2, choose)


def dpo_loss(params, batch, key, model, beta, anchor):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) -> (sum, count). batch: x, y, w (n, 2, T), the chosen
    answer first, and the log-probabilities (n, 2) that the model before training gave them, the reference.

    A softmax of the two rewards, as in any classification. `anchor` adds the loss per token of the chosen answer, whose
    probability would otherwise fall along with that of the rejected one (arXiv 2404.19733)."""
    x, y, w, reference = batch
    logp = jax.vmap(log_probs, (None, 0, 0, 0, None))(params, x, y, w, model)
    reward = beta * (logp - reference)
    top = jax.lax.stop_gradient(reward.max(-1))
    losses = jnp.log(jnp.exp(reward - top[:, None]).sum(-1)) + top - reward[:, 0]
    return (losses - anchor * logp[:, 0] / w[:, 0].sum(-1)).sum(), np.float32(len(x))


def prefer(cfg, given):
    """Train on preferences, and print what that changed."""
    out_dir, data_dir = pathlib.Path(cfg.out_dir), pathlib.Path(cfg.data_dir)
    path, log_path = out_dir / "dpo.npz", out_dir / "log_dpo.csv"
    if cfg.resume:
        state, about, *_ = gpt.load_checkpoint(path)
        cfg = gpt.resume_config(cfg, given, about["config"], path)
    elif not cfg.init:
        gpt.make_if_missing(out_dir / "chat.npz", main, inherited(cfg, given))
        cfg = dataclasses.replace(cfg, init=str(out_dir / "chat.npz"))
    before, was, model, tokenizer = gpt.load_checkpoint(cfg.init)
    before = before["params"]
    preferences = (read_preferences(cfg.dpo) if cfg.dpo else
                   own_preferences(before, model, tokenizer, data_dir / "qa.jsonl", cfg.seed))
    test = read_test(cfg.eval) if cfg.eval else [] if cfg.dpo else read_test(data_dir / "qa_test.jsonl")
    test = [r for r in test if str(r.get("set", "B")).startswith("B")]
    T = model.block_size
    examples = [[render([q, answer], tokenizer) for answer in answers] for q, *answers in preferences]
    fit = [i for i, pair in enumerate(examples) if all(len(ids) <= T for ids, _ in pair)]
    held = max(1, len(fit) // 10)
    print(f"{len(fit)} preferences ({len(examples) - len(fit)} longer than the context left out), {held} held out")
    if len(fit) < 2:
        raise InputError(f"{cfg.dpo or cfg.init}: fewer than two preferences that fit the context of {T} tokens")
    rows = np.array([[shift(*e, T) for e in examples[i]] for i in fit])
    reference = log_probs_of(before, rows, model)
    if not cfg.resume:
        state, about = gpt.new_state(before), dict(was, kind="chat", step=0, seconds=0.0)

    def batch_at(number):
        some = held + epoch_order(len(rows) - held, cfg.batch_size, cfg.seed, number)
        x, y, w = rows[some].transpose(2, 0, 1, 3)
        return x, y, w.astype(np.float32), reference[some]

    def judge(params):
        """Loss, accuracy, margin and both rewards on the held-out preferences."""
        reward = cfg.beta * (log_probs_of(params, rows[:held], model) - reference[:held])
        margin = reward[:, 0] - reward[:, 1]
        return np.logaddexp(0, -margin).mean(), 100 * (margin > 0).mean(), margin.mean(), *reward.mean(0)

    objective = functools.partial(dpo_loss, model=model, beta=cfg.beta, anchor=cfg.anchor)
    validate = lambda params: (float(judge(params)[0]), "")
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path, log_path, lambda params: None)
    names = ["DPO loss, held out", "chosen preferred, %", "margin", "reward of the chosen", "reward of the rejected",
             f"chosen answer given, sampled at {BOLD}, %", "tokens an answer, sampled", "test answers right, %"]
    columns = []
    for params in (before, state["params"]):
        said = bold_answers(params, model, tokenizer, [preferences[i][0] for i in fit[:held]], cfg.seed + 1)
        same = [text == preferences[i][1] for i, (text, *_) in zip(fit, said)]
        right = [100 * np.mean(grade(params, model, tokenizer, test)[0])] if test else []
        columns.append([*judge(params), 100 * np.mean(same), np.mean([n for _, n, _ in said]), *right])
    print(f"{'':<44}{'before':>10}{'after':>10}")
    for name, *values in zip(names, *columns):
        print(f"{name:<44}" + "".join(f"{value:>10.3f}" for value in values))
    print(f"checkpoint: {path}\nnext: python chat.py {path}")


# ---------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Config(gpt.Training):
    pairs: str = setting((), "questions and answers, JSON or JSON lines; nothing: the built-in ones", nargs="*",
                         positional="pairs", metavar="PAIRS")
    init: str = setting("", "checkpoint to start from; nothing: base.npz in out_dir, for DPO chat.npz", metavar="CKPT")
    eval: str = setting("", "questions and answers to test with; without PAIRS nothing is trained", metavar="PAIRS")
    show: int = setting(0, "print this many examples with what is trained, and stop")
    replay: float = setting(0.25, "part of the rows that is pretraining text", high=0.9)
    dpo: str = setting(None, "preferences to train on; without a file: made from the model's own answers", nargs="?",
                       const="", metavar="PREFERENCES")
    beta: float = setting(0.1, "DPO: how far the model may move from what it was")
    anchor: float = setting(1.0, "DPO: weight of the plain loss on the chosen answer")
    batch_size: int = setting(32, "rows in a micro-batch", low=1, high=1 << 20)
    max_steps: int = setting(600, "optimiser steps [with --dpo: 60]", low=1)
    learning_rate: float = setting(2e-3, "at its peak, after warm-up; falls along a cosine to 5 % of it [--dpo: 3e-5]")


def inherited(cfg, given):
    """The flags that a script which is run for its result should have too."""
    return [f"--{name}={getattr(cfg, name)}" for name in ("data_dir", "out_dir", "seed") if name in given]


def read_examples(paths, tokenizer, T):
    """Files of pairs -> the rendered examples that fit the context; says how many do not."""
    examples = [render(turns_of(*record), tokenizer) for path in paths for record in read_records(path)]
    fitting = [(ids, trained) for ids, trained in examples if len(ids) <= T]
    if len(fitting) < len(examples):
        print(f"left out: {len(examples) - len(fitting)} of {len(examples)} examples, longer than the context of {T}")
    if not fitting:
        raise InputError(f"{paths[0]}: no example fits the context of {T} tokens; a base needs a larger --block_size")
    return fitting


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    if cfg.dpo is not None:
        unset = {"max_steps": 60, "learning_rate": 3e-5, "eval_every": 20}
        cfg = dataclasses.replace(cfg, **{k: v for k, v in unset.items() if k not in given})
        return prefer(cfg, given if cfg.dpo else given - {"dpo"})
    out_dir, data_dir = pathlib.Path(cfg.out_dir), pathlib.Path(cfg.data_dir)
    path, log_path, base = out_dir / "chat.npz", out_dir / "log_sft.csv", pathlib.Path(cfg.init or out_dir / "base.npz")
    only_test = bool(cfg.eval) and not cfg.pairs and path.exists() and not cfg.init
    if not (cfg.init or cfg.resume or only_test):
        gpt.make_if_missing(base, gpt.main, inherited(cfg, given))
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
    held = rows[:len(rows) // 20 * bool(cfg.pairs)]  # a part of your own examples is kept to measure with
    rows = rows[len(held):]
    nats = lambda params: -log_probs_of(params, held, model).sum() / held[:, 2].sum()
    replay, validate, source = None, None, data_dir / "tokenizer.json"
    if source.exists() and Tokenizer.load(source).merges == tokenizer.merges:
        replay = gpt.load_tokens(data_dir / "train.bin", tokenizer, T + 1)
        validate = gpt.make_validation(gpt.load_tokens(data_dir / "val.bin", tokenizer, 2), tokenizer, model, cfg)
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
    print(f"{len(rows)} examples, {rows[:, 2].sum()} trained tokens,"
          f" {len(rows) / (cfg.batch_size * (1 - cfg.replay)):.0f} steps an epoch")
    if len(held):
        print(f"{len(held)} examples held out, loss of their answers {nats(state['params']):.3f}")
    batch_at = functools.partial(mixed_batch, rows, replay, cfg.batch_size, cfg.replay, T, cfg.seed)
    objective = functools.partial(gpt.loss, model=model)
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path, log_path, lambda params: None)
    if len(held):
        print(f"loss of the held-out answers after training: {nats(state['params']):.3f}")
    if test:
        columns["after"], ended = grade(state["params"], model, tokenizer, test)
        table(test, columns, "set")
        print(f"{100 * ended:.1f} % of the answers end by themselves")
        hard = [i for i, record in enumerate(test) if record.get("set") == "B, new wording"]
        if hard:
            print("\nB, new wording:")
            table([test[i] for i in hard], {"after": [columns["after"][i] for i in hard]}, "attribute")
    print(f"checkpoint: {path}\nnext: python chat.py {path}")


if __name__ == "__main__":
    run(main)

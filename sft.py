"""Supervised fine-tuning: from a model that continues text to one that answers. And DPO, the level after that.

    python sft.py                             # the built-in questions, out/base.npz -> out/chat.npz
    python sft.py mine.jsonl --init out/base.npz --eval held_out.jsonl
    python sft.py --show 3                    # three examples, the trained tokens in colour, then stop
    python sft.py --eval questions.jsonl      # no training: how many answers of out/chat.npz are right
    python sft.py --dpo                       # right answers against its own rambling, out/chat.npz -> out/dpo.npz

Pretraining gave the model its knowledge; here it learns the manner. The step is that of gpt.py, but only the tokens
of answers have weight. Reading order: reading files, examples, answers and their marks, fine-tuning and DPO, main.
"""
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections import Counter

import gpt
import jax
import jax.numpy as jnp
import numpy as np
import prepare
from prepare import ASSISTANT, END, USER, InputError, Tokenizer, read_flags, run, setting, show_progress

# ---------------------------------------------------------------- reading files


def read_records(path):
    """A JSON list or JSON lines, also .gz -> [(record, "file:line")]."""
    lines = [(line, source) for line, source in prepare.read_lines(path) if line.strip()]
    is_list = bool(lines) and lines[0][0].lstrip().startswith("[")
    if is_list:
        lines = [("".join(line for line, _ in lines), path)]
    records = []
    for text, source in lines:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{source}: not JSON ({e})") from None
        records.append((record, source))
    if is_list:
        records = [(record, f"{path}: record {i}") for i, record in enumerate(record, 1)]
    if not records:
        raise InputError(f"{path}: empty; give it questions and answers")
    return records


def turns_of(record, source, answer="response"):
    """One record -> [question, answer, question, answer, ...]; raises InputError naming the line.

    {"instruction" or "prompt", "response"}, Alpaca's {"instruction", "input", "output"}, Dolly's {"instruction",
    "context", "response"}, or {"messages": [{"role", "content"}, ...]} whose system turn goes before the first
    question. For DPO `answer` is "chosen" or "rejected"."""
    roles = ["user", "assistant"]
    try:
        if "messages" in record and answer == "response":
            roles = [m["role"] for m in record["messages"]]
            turns = [m["content"] for m in record["messages"]]
            if roles[0] == "system":
                roles, turns = roles[1:], ["\n\n".join(turns[:2]), *turns[2:]]
        else:
            record = {"instruction": record.get("prompt"), "response": record.get("output")} | record
            more = [record[k] for k in ("input", "context") if record.get(k)]
            turns = ["\n\n".join([record["instruction"], *more]), record[answer]]
        right = roles == ["user", "assistant"] * max(1, len(roles) // 2) and all(t.strip() for t in turns[1::2])
    except (AttributeError, IndexError, KeyError, TypeError):  # anything can be in a JSON file
        right = False
    if not right or not all(isinstance(t, str) for t in turns):
        answers = ('"response" (or "output"), or "messages" whose roles go user, assistant, user, assistant, ...'
                   if answer == "response" else '"chosen" and "rejected"')
        raise InputError(f'{source}: needs "instruction" and {answers}; all are text, and no answer is empty')
    return turns


# ---------------------------------------------------------------- examples


def render(turns, tokenizer):
    """[question, answer, ...] -> (ids, which of them are trained): <|user|> question <|assistant|> answer <|end|> ...

    Put together from ids, so no text can forge a special token. A turn is encoded with a space before it: its first
    word is then the same token as within a text. An odd number of turns ends in <|assistant|>: the prompt of chat.py.
    """
    ids, trained = [], []
    for i, text in enumerate(turns):
        words, is_answer = tokenizer.encode(f" {text}"), i % 2 == 1
        ids += [*words, END] if is_answer else [USER, *words, ASSISTANT]
        trained += [is_answer] * (len(ids) - len(trained))
    return ids, trained


def read_examples(records, tokenizer, T, answers=("response",)):
    """Records -> for each that fits the context its rendered conversations, one for each name of an answer."""
    examples = [[render(turns_of(*record, answer), tokenizer) for answer in answers] for record in records]
    fitting = [example for example in examples if all(len(ids) <= T for ids, _ in example)]
    if len(fitting) < len(examples):
        print(f"left out: {len(examples) - len(fitting)} of {len(examples)} examples, longer than the context of {T}")
    if not fitting:
        raise InputError(f"no example fits the context of {T} tokens; a base needs a larger --block_size")
    return fitting


def show(ids, trained, tokenizer):
    """The example as text; what is trained stands out."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    special, text = dict(enumerate(prepare.SPECIAL)), ""
    for is_trained, part in itertools.groupby(zip(ids, trained), lambda pair: pair[1]):
        words = "".join(special.get(i) or prepare.printable(tokenizer.decode([i])) for i, _ in part)
        text += f"{on}{words}{off}" if is_trained else words
    return text


def shift(ids, trained, T):
    """Ids and mask -> one row x, y, w of length T; w is 1 where the *target* y is trained, else (and in padding) 0."""
    row = np.zeros((3, T), np.int32)
    row[:, : len(ids) - 1] = ids[:-1], ids[1:], trained[1:]
    return row


def epoch_order(count, n, seed, number):
    """Which n of count examples make the number-th batch: each is seen once in an epoch, in an order of its own."""
    first, start = divmod(number * n, count)
    epochs = range(first, first + (start + n - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    return order[start:start + n]


def mixed_batch(rows, new, replay_ids, old, T, seed, number):
    """The number-th batch: `new` examples and `old` rows of pretraining text with full weight, against forgetting
    (arXiv 2503.21676). A function of (seed, number)."""
    x, y, w = rows[epoch_order(len(rows), new, seed, number)].swapaxes(0, 1)
    if old:
        replayed = gpt.random_batch(replay_ids, old, T, seed, number)
        x, y, w = (np.concatenate(pair) for pair in zip((x, y, w), replayed))
    return x, y, w.astype(np.float32)


# ---------------------------------------------------------------- answers and their marks


def answer_all(params, model, tokenizer, prompts, max_new_tokens, temperature=0.0, seed=0, may_end=True):
    """Answers to prompts (lists of ids) -> [(text, ids)]."""
    generate, rng, n, answers = gpt.make_generator(model), np.random.default_rng(seed), 64, []
    never = np.zeros(model.vocab_size)
    never[END] = 0 if may_end else -np.inf
    choose = lambda i, logits, history: gpt.sample(logits + never, history, rng, temperature)
    for start in range(0, len(prompts), n):
        some = prompts[start:start + n]
        padding = [[END]] * (n - len(some))  # batches of a fixed size: compiled once
        steps = list(generate(params, some + padding, choose, max_new_tokens))
        for i in range(len(some)):
            ids = [step[i] for step in steps if step[i] is not None]
            answers.append((tokenizer.decode(ids).removeprefix(" "), ids))
        show_progress(f"answering: {len(answers)} of {len(prompts)}", last=len(answers) == len(prompts))
    return answers


def grade(params, model, tokenizer, test, column):
    """Answer greedily; record[column] becomes whether the whole answer is right. -> the part of answers that ended.

    test: records with "turns", as turns_of gives them. A record with a "prompt" is a text to complete, not a question.
    """
    prompts = [[END, *tokenizer.encode(r["prompt"])] if "prompt" in r else render(r["turns"][:-1], tokenizer)[0]
               for r in test]
    longest = max(len(tokenizer.encode(r["turns"][-1])) for r in test) + 8
    ended = []
    for r, (text, ids) in zip(test, answer_all(params, model, tokenizer, prompts, longest)):
        expected = r["turns"][-1]
        if "prompt" in r:
            r[column] = text.startswith(expected.strip())  # the text may go on
        else:
            r[column] = text == expected
            ended.append(END in ids)
    return sum(ended) / max(1, len(ended))


def table(test, columns):
    """Print the percentage of right answers in each set. The best constant guess always says the most frequent value of
    an attribute."""
    heads = "".join(f"{name:>20}" for name in [*columns, "best constant guess"])
    print(f"{'set':<24}{'questions':>10}{heads}")
    set_of = lambda r: prepare.printable(str(r.get("set", "all")))
    for name in dict.fromkeys(map(set_of, test)):
        group = [r for r in test if set_of(r) == name]
        values = Counter((str(r.get("attribute")), str(r.get("value", r["turns"][-1]))) for r in group).most_common()
        guessed = {attribute: count for (attribute, _), count in reversed(values)}  # its highest count comes last
        right = [*(sum(r[column] for r in group) for column in columns), sum(guessed.values())]
        print(f"{name:<24}{len(group):>10}" + "".join(f"{100 * count / len(group):>20.1f}" for count in right))


@functools.partial(jax.jit, static_argnames="model")
def log_probs(params, x, y, w, model):
    """Log-probability of what is trained in each row: x, y, w (n, T) -> (n,)."""
    losses = jax.vmap(functools.partial(gpt.token_losses, key=None, model=model), (None, 0, 0))(params, x, y)
    return -(losses * w).sum(-1)


def log_probs_of(params, rows, model, n=32):
    """The same for any number of rows (..., 3, T) -> (...), in batches of a fixed size."""
    flat, parts = rows.reshape(-1, *rows.shape[-2:]), []
    for start in range(0, len(flat), n):
        x, y, w = np.resize(flat[start:start + n], (n, *flat.shape[1:])).swapaxes(0, 1)
        parts.append(log_probs(params, x, y, w, model))
    return np.concatenate(parts)[:len(flat)].reshape(rows.shape[:-2])


# ---------------------------------------------------------------- fine-tuning and DPO


def imitate(cfg, rows, held, model, tokenizer):
    """Makes answers likelier. rows (N, 1, 3, T), the first `held` of them not trained on -> objective, batch_at and
    validate for gpt.train, measure(params) -> {name: value} of those held out, and the examples in a batch."""
    rows, data_dir, replay, old, validate = rows[:, 0], pathlib.Path(cfg.data_dir), None, 0, None
    source = data_dir / "tokenizer.json"
    if source.exists() and Tokenizer.load(source).merges == tokenizer.merges:
        replay = gpt.load_tokens(data_dir / "train.bin", tokenizer, model.block_size + 1)
        old = min(cfg.batch_size - 1, round(cfg.batch_size * cfg.replay))
        validate = gpt.make_validation(gpt.load_tokens(data_dir / "val.bin", tokenizer, 2), tokenizer, model, cfg)
    else:
        print(f"{data_dir} is not the text that {cfg.init} was trained on, so none of it is replayed")
    new = cfg.batch_size - old
    batch_at = functools.partial(mixed_batch, rows[held:], new, replay, old, model.block_size, cfg.seed)

    def measure(params):
        return {"loss of the held-out answers": -log_probs_of(params, rows[:held], model).sum() / rows[:held, 2].sum()}

    return functools.partial(gpt.loss, model=model), batch_at, validate, measure, new


BOLD = 1.2  # temperature at which the model is sampled, so that it does not always say the same


def own_preferences(cfg, n=1000):
    """The right answers of the built-in questions against the model's own rambling, what it says when it must go on ->
    as read_records."""
    state, _, model, tokenizer = gpt.load_checkpoint(cfg.init)
    path = pathlib.Path(cfg.data_dir) / "qa.jsonl"
    pairs = {r["instruction"]: r["response"] for r, _ in read_records(path) if "instruction" in r}
    questions = np.random.default_rng(cfg.seed).permutation(sorted(pairs))[:n].tolist()
    prompts = [render([q], tokenizer)[0] for q in questions]
    said = answer_all(state["params"], model, tokenizer, prompts, model.block_size // 2, BOLD, cfg.seed, may_end=False)
    return [(dict(instruction=q, chosen=pairs[q], rejected=text), path)
            for q, (text, _) in zip(questions, said) if text.strip() and text != pairs[q]]


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


def prefer(cfg, rows, held, model, tokenizer):
    """Makes the chosen answers likelier than the rejected ones: as imitate, with rows (N, 2, 3, T)."""
    reference = log_probs_of(gpt.load_checkpoint(cfg.init)[0]["params"], rows, model)
    prompts = [x[:w.argmax() + 1].tolist() for x, _, w in rows[:held, 0]]
    answers = [tokenizer.decode(y[w == 1]).removeprefix(" ") for _, y, w in rows[:held, 0]]

    def batch_at(number):
        some = held + epoch_order(len(rows) - held, cfg.batch_size, cfg.seed, number)
        x, y, w = rows[some].transpose(2, 0, 1, 3)
        return x, y, w.astype(np.float32), reference[some]

    def rewards(params):
        return (cfg.beta * (log_probs_of(params, rows[:held], model) - reference[:held])).T

    def validate(params):
        chosen, rejected = rewards(params)
        return float(np.logaddexp(0, rejected - chosen).mean()), ""

    def measure(params):
        chosen, rejected = rewards(params)
        said = answer_all(params, model, tokenizer, prompts, model.block_size // 2, BOLD, cfg.seed + 1)
        same = [text == answer for answer, (text, _) in zip(answers, said)]
        return {"DPO loss, held out": validate(params)[0], "chosen preferred, %": 100 * (chosen > rejected).mean(),
                "margin": (chosen - rejected).mean(), "reward of the chosen": chosen.mean(),
                "reward of the rejected": rejected.mean(),
                f"chosen answer given, sampled at {BOLD}, %": 100 * np.mean(same),
                "tokens an answer, sampled": np.mean([len(ids) for _, ids in said])}

    objective = functools.partial(dpo_loss, model=model, beta=cfg.beta, anchor=cfg.anchor)
    return objective, batch_at, validate, measure, cfg.batch_size


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


def main(argv):
    cfg, given = read_flags(Config, argv, __doc__)
    out_dir, data_dir, dpo = pathlib.Path(cfg.out_dir), pathlib.Path(cfg.data_dir), cfg.dpo is not None
    if dpo and cfg.pairs:
        raise InputError(f"{cfg.pairs[0]}: preferences go behind --dpo; PAIRS are for fine-tuning")
    only_test = cfg.eval and not (dpo or cfg.pairs or cfg.resume)
    path, log_path = out_dir / f"{'dpo' if dpo else 'chat'}.npz", out_dir / f"log_{'dpo' if dpo else 'sft'}.csv"
    base, script = (out_dir / "chat.npz", main) if dpo or only_test else (out_dir / "base.npz", gpt.main)
    if dpo:
        unset = {"max_steps": 60, "learning_rate": 3e-5, "eval_every": 20}
        cfg = dataclasses.replace(cfg, **{k: v for k, v in unset.items() if k not in given})
    if not (cfg.init or cfg.resume):
        for name in {*cfg.pairs, cfg.eval, cfg.dpo} - {"", None, "-"}:
            read_records(name)  # what is wrong with it is told now, not after a pretraining
        inherited = [f"--{name}={getattr(cfg, name)}" for name in ("data_dir", "out_dir", "seed") if name in given]
        gpt.make_if_missing(base, script, inherited)
        cfg = dataclasses.replace(cfg, init=str(base))
    if dpo and not cfg.resume and pathlib.Path(cfg.init) == path:
        raise InputError(f"--init {path}: would be overwritten, but DPO compares with it to the end; rename it first")
    if not (cfg.resume or cfg.pairs or cfg.dpo or cfg.eval or (data_dir / "qa.jsonl").exists()):
        raise InputError(f"{data_dir}: no questions, only the built-in corpus has some: python sft.py PAIRS takes your"
                         " own, python chat.py out/base.npz continues a text")
    state, about, model, tokenizer = gpt.load_checkpoint(path if cfg.resume else cfg.init)
    if cfg.resume:
        cfg = gpt.resume_config(cfg, given if cfg.dpo else given - {"dpo"}, about["config"], path)
    test = []
    if cfg.eval or not (cfg.pairs or cfg.dpo):
        test = read_records(cfg.eval or data_dir / "qa_test.jsonl")
        test = [dict(record, turns=turns_of(record, source)) for record, source in test]
    if dpo:  # answers about B alone show whether knowledge is kept
        test = [r for r in test if str(r.get("set", "B")).startswith("B")]
    if only_test:
        grade(state["params"], model, tokenizer, test, pathlib.Path(cfg.init).name)
        return table(test, [pathlib.Path(cfg.init).name])
    if dpo:
        records = read_records(cfg.dpo) if cfg.dpo else own_preferences(cfg)
        examples = read_examples(records, tokenizer, model.block_size, ["chosen", "rejected"])
    else:
        records = [record for name in cfg.pairs or [data_dir / "qa.jsonl"] for record in read_records(name)]
        examples = read_examples(records, tokenizer, model.block_size)
    if cfg.show:
        return print("\n".join(show(*turns, tokenizer) for example in examples[:cfg.show] for turns in example))
    rows = np.array([[shift(*turns, model.block_size) for turns in example] for example in examples])
    held = max(1, len(rows) // 10) if dpo else len(rows) // 20 * bool(cfg.pairs)  # a part is kept to measure with
    if held == len(rows):
        raise InputError(f"{cfg.dpo or cfg.init}: one preference is held out, so two are needed")
    objective, batch_at, validate, measure, per_batch = (prefer if dpo else imitate)(cfg, rows, held, model, tokenizer)
    print(f"{len(rows)} examples, {held} of them held out, {rows[held:, :, 2].sum()} trained tokens,"
          f" {(len(rows) - held) / per_batch / cfg.grad_accum:.0f} steps an epoch")
    if not cfg.resume:
        if test:
            grade(state["params"], model, tokenizer, test, "before")
        if about["kind"] == "base" and not dpo:  # the roles' ids were reserved but never seen: start amid the others
            noise = np.random.default_rng(cfg.seed).normal(0, 0.02, (2, model.n_embd))
            state["params"]["wte"][[USER, ASSISTANT]] = state["params"]["wte"].mean(0) + noise
        before = {name: float(value) for name, value in measure(state["params"]).items()} if held else {}
        state, about = gpt.new_state(state["params"]), dict(about, kind="chat", step=0, seconds=0.0, before=before)
    state = gpt.train(cfg, state, about, objective, batch_at, validate, path, log_path, lambda params: None)
    if held:
        print(f"{'':<44}{'before':>10}{'after':>10}")
        for name, value in measure(state["params"]).items():
            print(f"{name:<44}{about['before'][name]:>10.3f}{value:>10.3f}")
    if test:
        ended = grade(state["params"], model, tokenizer, test, "after")
        table(test, ["after"] if cfg.resume else ["before", "after"])
        print(f"{100 * ended:.1f} % of the answers end by themselves")
    print(f"checkpoint: {path}\nnext: python chat.py {path}")


if __name__ == "__main__":
    run(main)
